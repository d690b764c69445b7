# ruff: noqa: ANN001, ANN201  (Triton reads annotations as its own)
"""The kernels around the scan: sums of parts in a fixed order, the states carried from split to split, transposition."""

import triton
import triton.language as tl

from .common import LOG2E, step


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
        total += tl.load(parts_ptr + source + j * inner, mask=mask, other=0.0).to(tl.float32)
        j += 1
    tl.store(out_ptr + at, total, mask=mask)


@triton.jit
def carry_kernel(
    end_ptr, total_ptr, A_ptr, carry_ptr, count, K, splits, channels, stride_path, stride_split,
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
    A = tl.load(A_ptr + (path % K) * inner + nc, mask=mask, other=0.0).to(tl.float32) * LOG2E
    j = tl.arange(0, SPLITS)[:, None]
    split = splits - 1 - j if REVERSE else j
    real = mask[None, :] & (j < splits)
    here = path[None, :] * splits + split
    decay = tl.exp2(A[None, :] * tl.load(total_ptr + here * channels + (nc % channels)[None, :], mask=real, other=0.0))
    state = tl.load(end_ptr + here * inner + nc[None, :], mask=real, other=0.0)
    _, state = tl.associative_scan((decay, state), 0, step)
    following = split - 1 if REVERSE else split + 1
    into = carry_ptr + path[None, :] * stride_path + following * stride_split + nc[None, :]
    tl.store(into, state, mask=mask[None, :] & (j + 1 < splits))


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
