# ruff: noqa: ANN001, ANN201, E501  (Triton reads annotations as its own)
"""The kernels around the scan: sums of parts in a fixed order, and the states carried from split to split."""

import triton
import triton.language as tl

from .common import LOG2E


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
    REVERSE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters every split but the first, from each split's own end (from zero) and its sum of delta.

    Elements are (batch * K, N, C); `end` is (batch * K, splits, N, C), `total` (batch * K, splits, C); the state before split j goes
    to `carry` at j * stride_split. With REVERSE: the gradient that comes back into every split but the last.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    inner = channels * N
    path = at // inner
    nc = at % inner
    A = tl.load(A_ptr + (path % K) * inner + nc, mask=mask, other=0.0).to(tl.float32) * LOG2E
    state = tl.zeros([BLOCK], tl.float32)
    j = 0
    while j < splits:
        split = splits - 1 - j if REVERSE else j
        if j > 0:
            tl.store(carry_ptr + path * stride_path + split * stride_split + nc, state, mask=mask)
        here = path * splits + split
        decay = tl.exp2(A * tl.load(total_ptr + here * channels + nc % channels, mask=mask, other=0.0))
        state = decay * state + tl.load(end_ptr + here * inner + nc, mask=mask, other=0.0)
        j += 1
