# ruff: noqa: ANN001, ANN201  (Triton reads annotations as its own)
"""The kernels around the scan: sums of parts in a fixed order, the states carried from split to split, transposition."""

import itertools

import torch
import triton
import triton.language as tl

from .common import LOG2E, STEPS, path_length, step


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, count, parts, inner, part_outer, BLOCK: tl.constexpr):
    """out[o, i] = sum over j of parts[o, j, i] in float32, for i < inner; `part_outer` = parts * inner.

    The number of parts is small (paths, channel blocks): each program adds them in order.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    source = (at // inner) * part_outer + at % inner
    total = tl.zeros([BLOCK], tl.float32)
    j = 0
    while j < parts:
        total += tl.load(parts_ptr + source, mask=mask, other=0.0).to(tl.float32)
        source += inner  # j * inner may exceed 32 bits
        j += 1
    tl.store(out_ptr + at, total, mask=mask)


@triton.jit
def sum_rows_kernel(
    rows_ptr, first_ptr, second_ptr, third_ptr, fourth_ptr, rows, columns, end_first, end_second, end_third,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of columns: of those up to `end_first` into the first output, from there to `end_second` into the second, and so on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    total = tl.zeros([BLOCK], tl.float32)
    j = 0
    while j < rows:
        row = j + tl.arange(0, ROWS)[:, None]
        source = rows_ptr + row.to(tl.int64) * columns + at[None, :]
        total += tl.sum(tl.load(source, mask=mask[None, :] & (row < rows), other=0.0), 0)
        j += ROWS
    tl.store(first_ptr + at, total, mask=mask & (at < end_first))
    tl.store(second_ptr + at - end_first, total, mask=mask & (at >= end_first) & (at < end_second))
    tl.store(third_ptr + at - end_second, total, mask=mask & (at >= end_second) & (at < end_third))
    tl.store(fourth_ptr + at - end_third, total, mask=mask & (at >= end_third))


def sum_rows(rows: torch.Tensor, widths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Sums over float32 (rows, columns), in a fixed order, as up to four tensors of `widths` columns with storage of their own."""
    sums = [rows.new_empty(width, dtype=dtype) for width in widths]
    ends = [*itertools.accumulate(widths), *[rows.shape[1]] * 3]
    height = min(triton.next_power_of_2(rows.shape[0]), 128)
    block = 2048 // height
    with torch.cuda.device(rows.device if rows.is_cuda else -1):
        sum_rows_kernel[(triton.cdiv(rows.shape[1], block),)](
            rows, *(sums + sums[-1:] * 3)[:4], *rows.shape, *ends[:3], ROWS=height, BLOCK=block, num_warps=4
        )
    return sums


@triton.jit
def carry_kernel(
    end_ptr, total_ptr, A_ptr, carry_ptr, count, K, splits, channels, stride_path, stride_split, A_k, A_n, A_c,
    REVERSE: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters every split but the first, from each split's own end (from zero) and its sum of delta.

    Elements are (batch * K, N, C); `end` is (batch * K, splits, N, C), `total` (batch * K, splits, C); the state before split j
    goes to `carry` at j * stride_split. With REVERSE: the gradient that comes back into every split but the last.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    inner = channels * N
    path = at // inner
    nc = at % inner
    A_at = (path % K) * A_k + (nc // channels) * A_n + (nc % channels) * A_c
    A = tl.load(A_ptr + A_at, mask=mask, other=0.0).to(tl.float32) * LOG2E
    j = tl.arange(0, SPLITS)[:, None]
    split = splits - 1 - j if REVERSE else j
    real = mask[None, :] & (j < splits)
    here = path[None, :] * splits + split
    decay = tl.exp2(A[None, :] * tl.load(total_ptr + here * channels + (nc % channels)[None, :], mask=real, other=0.0))
    state = tl.load(end_ptr + here * inner + nc[None, :], mask=real, other=0.0)
    _, state = tl.associative_scan((decay, state), 0, step)
    following = split - 1 if REVERSE else split + 1
    into = carry_ptr + path[None, :] * stride_path + following.to(tl.int64) * stride_split + nc[None, :]
    tl.store(into, state, mask=mask[None, :] & (j + 1 < splits))


def carry_splits(
    ends: torch.Tensor,
    totals: torch.Tensor,
    A: torch.Tensor,
    carry: torch.Tensor,
    stride_path: int,
    stride_split: int,
    reverse: bool,
) -> None:
    """Run `carry_kernel` on ends (batch, K, splits, N, C) and totals (batch, K, splits, C) of a first pass, and A (K, N, C)."""
    batch, k, splits, n, channels = ends.shape
    count = batch * A.numel()
    padded = triton.next_power_of_2(splits)
    block = max(1, 2048 // padded)
    with torch.cuda.device(ends.device if ends.is_cuda else -1):
        carry_kernel[(triton.cdiv(count, block),)](
            ends, totals, A, carry, count, k, splits, channels, stride_path, stride_split, *A.stride(),
            REVERSE=reverse, N=n, SPLITS=padded, BLOCK=block, num_warps=4,
        )  # fmt: skip


@triton.jit
def transpose_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, rows, columns, a_b, a_r, a_c, b_b, b_r, b_c, c_b, c_r, c_c, d_b, d_r, d_c, out_m, batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to four maps (batch, rows, columns) into `out` (maps, batch, columns, rows), the second grid axis choosing the map."""
    which = tl.program_id(1)
    m_ptr = a_ptr
    m_b, m_r, m_c = a_b, a_r, a_c
    if which == 1:
        m_ptr = b_ptr
        m_b, m_r, m_c = b_b, b_r, b_c
    elif which == 2:
        m_ptr = c_ptr
        m_b, m_r, m_c = c_b, c_r, c_c
    elif which == 3:
        m_ptr = d_ptr
        m_b, m_r, m_c = d_b, d_r, d_c
    tiles = (columns + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    column = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    rest = pid // tiles
    bands = (rows + BLOCK - 1) // BLOCK
    row = (rest % bands) * BLOCK + tl.arange(0, BLOCK)
    image = (rest // bands).to(tl.int64)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    m = tl.load(m_ptr + image * m_b + row[:, None].to(tl.int64) * m_r + column[None, :].to(tl.int64) * m_c, mask=mask, other=0.0)
    at = image * rows * columns + column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out_ptr + which.to(tl.int64) * out_m + at, tl.trans(m), mask=tl.trans(mask))


@triton.jit
def path_step(kind, flip, p, height, width):
    """The step at which a path visits the raster position p."""
    row = p // width
    col = p - row * width
    w = tl.maximum(kind - 1, 1)
    across = (width + w - 1) // w
    window = ((row // w) * across + col // w) * w * w + (row % w) * w + col % w
    step = tl.where(kind == 0, p, tl.where(kind == 1, col * height + row, window))
    return tl.where(flip == 1, path_length(kind, height, width) - 1 - step, step)


@triton.jit
def merge_parts_kernel(
    parts_ptr, scales_ptr, out_ptr, height, width, channels, tiles,
    PATHS: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[p, c] = sum over the paths k of parts[k, p, c] * scales[k, tile of p, c], for one image, BP positions and BC channels."""
    K: tl.constexpr = len(PATHS)
    blocks = (channels + BC - 1) // BC
    bands = (height * width + BP - 1) // BP
    pid = tl.program_id(0)
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    p = ((pid // blocks) % bands) * BP + tl.arange(0, BP)[:, None]
    image = (pid // blocks // bands).to(tl.int64)
    mask = (p < height * width) & (c < channels)
    total = tl.zeros([BP, BC], tl.float32)
    for k in tl.static_range(K):
        tile = path_step(PATHS[k] // 2, PATHS[k] % 2, p, height, width) // STEPS
        part = tl.load(parts_ptr + (image * K + k) * height * width * channels + p * channels + c, mask=mask, other=0.0)
        scale = tl.load(scales_ptr + (image * K + k) * tiles * channels + tile * channels + c, mask=mask, other=0.0)
        total += part.to(tl.float32) * scale.to(tl.float32)
    tl.store(out_ptr + image * height * width * channels + p * channels + c, total, mask=mask)


def merge_parts(
    parts: torch.Tensor, scales: torch.Tensor, size: tuple[int, int], codes: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """(batch, K, positions, C) in tiles of the paths with scales (batch, K, tiles, C) -> their sum (batch, 1, positions, C)."""
    batch, _, positions, channels = parts.shape
    out = parts.new_empty((batch, 1, positions, channels), dtype=dtype)
    bands, blocks = triton.cdiv(positions, 32), triton.cdiv(channels, 64)
    with torch.cuda.device(parts.device if parts.is_cuda else -1):
        merge_parts_kernel[(bands * blocks * batch,)](
            parts, scales, out, *size, channels, scales.shape[2], PATHS=codes, STEPS=STEPS, BP=32, BC=64, num_warps=4
        )
    return out
