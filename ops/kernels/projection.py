# ruff: noqa: ANN001, ANN201, ANN202  (Triton reads annotations as its own)
"""Gradients of a low-rank step, from those of the full step: two small matrix products over what the scan kernel wrote."""

import triton
import triton.language as tl

from .common import split_weight


@triton.jit
def step_gradient_kernel(
    dv_ptr, weight_ptr, ddt_ptr, positions, channels, ddt_b, ddt_k, ddt_p, ddt_c,
    K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, TF32: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """ddt[p, r] = sum over c of dv[p, c] weight[c, r], for one image and path and BP positions; dv is (batch, K, positions, C)."""
    blocks = (positions + BP - 1) // BP
    pid = tl.program_id(0)
    p = (pid % blocks) * BP + tl.arange(0, BP)
    k = ((pid // blocks) % K).to(tl.int64)
    image = (pid // blocks).to(tl.int64)  # batch * K + k
    r = tl.arange(0, BR)
    ddt = tl.zeros([BP, BR], tl.float32)
    dv_ptr += (image * positions + p[:, None]) * channels
    weight_ptr += k * channels * R + r[None, :]
    here = p[:, None] < positions
    named = r[None, :] < R
    c = tl.arange(0, BC)
    dv = tl.load(dv_ptr + c[None, :], mask=here & (c[None, :] < channels), other=0.0)
    weight = tl.load(weight_ptr + c[:, None] * R, mask=(c[:, None] < channels) & named, other=0.0)
    first = 0
    while first < channels:
        first += BC
        c += BC
        next_dv = tl.load(dv_ptr + c[None, :], mask=here & (c[None, :] < channels), other=0.0)
        next_weight = tl.load(weight_ptr + c[:, None] * R, mask=(c[:, None] < channels) & named, other=0.0)
        ddt = tl.dot(dv, weight.to(tl.float32), ddt, input_precision="tf32" if TF32 else "ieee")
        dv, weight = next_dv, next_weight
    ddt_ptr += (image // K) * ddt_b + k * ddt_k + p[:, None].to(tl.int64) * ddt_p + r[None, :] * ddt_c
    tl.store(ddt_ptr, ddt, mask=(p[:, None] < positions) & (r[None, :] < R))


@triton.jit
def _block_of(
    block, count, blocks, k, c, r, real, dv_ptr, dt_ptr, positions, channels, dt_b, dt_k, dt_p, dt_c,
    K: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Start reading dv [BP, BC] and dt [BR, BP] of a block of positions; nothing from block `count` on."""
    image = (block // blocks).to(tl.int64)
    p = (block % blocks) * BP + tl.arange(0, BP)
    here = (p < positions) & (block < count)
    at = ((image * K + k) * positions + p[:, None]) * channels + c[None, :]
    dv = tl.load(dv_ptr + at, mask=here[:, None] & real[None, :], other=0.0)
    dt_at = dt_ptr + image * dt_b + k * dt_k + p[None, :].to(tl.int64) * dt_p + r[:, None] * dt_c
    return dv, tl.load(dt_at, mask=here[None, :] & (r[:, None] < R), other=0.0)


@triton.jit
def weight_gradient_kernel(
    dv_ptr, dt_ptr, parts_ptr, batch, positions, channels, chunks, dt_b, dt_k, dt_p, dt_c,
    K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SPLIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts[j, k, c, r] = sum over every `chunks`-th block of positions of dv[p, c] dt[p, r], to float32 accuracy."""
    cs = (channels + BC - 1) // BC
    pid = tl.program_id(0)
    c = (pid % cs) * BC + tl.arange(0, BC)
    real = c < channels
    k = ((pid // cs) % K).to(tl.int64)
    chunk = pid // cs // K
    r = tl.arange(0, BR)
    dweight = tl.zeros([BR, BC], tl.float32)
    blocks = (positions + BP - 1) // BP
    block = chunk
    dv, dt = _block_of(
        block, blocks * batch, blocks, k, c, r, real, dv_ptr, dt_ptr, positions, channels, dt_b, dt_k, dt_p, dt_c, K, R, BP
    )
    while block < blocks * batch:
        next_dv, next_dt = _block_of(
            block + chunks,
            blocks * batch,
            blocks,
            k,
            c,
            r,
            real,
            dv_ptr,
            dt_ptr,
            positions,
            channels,
            dt_b,
            dt_k,
            dt_p,
            dt_c,
            K,
            R,
            BP,
        )
        dt = dt.to(tl.float32)
        if SPLIT:
            high, low = split_weight(dv)
            dweight = tl.dot(dt, low, dweight, input_precision="tf32")
            dweight = tl.dot(dt, high, dweight, input_precision="tf32")
        else:
            dweight = tl.dot(dt, dv, dweight, input_precision="ieee")
        dv, dt = next_dv, next_dt
        block += chunks
    at = ((chunk * K + k) * channels + c[None, :]) * R + r[:, None]
    tl.store(parts_ptr + at, dweight, mask=(r[:, None] < R) & real[None, :])


@triton.jit
def projection_gradients_kernel(
    dv_ptr, dt_ptr, weight_ptr, ddt_ptr, parts_ptr, batch, positions, channels, chunks,
    dt_b, dt_k, dt_p, dt_c, ddt_b, ddt_k, ddt_p, ddt_c,
    K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SPLIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Both of the above in one reading of dv, where BC >= C and rank fit the registers."""
    pid = tl.program_id(0)
    k = (pid % K).to(tl.int64)
    chunk = pid // K
    c = tl.arange(0, BC)
    real = c < channels
    r = tl.arange(0, BR)
    weight = tl.load(weight_ptr + (k * channels + c[:, None]) * R + r[None, :], mask=real[:, None] & (r[None, :] < R), other=0.0)
    weight = weight.to(tl.float32)
    dweight = tl.zeros([BR, BC], tl.float32)
    blocks = (positions + BP - 1) // BP
    block = chunk
    dv, dt = _block_of(
        block, blocks * batch, blocks, k, c, r, real, dv_ptr, dt_ptr, positions, channels, dt_b, dt_k, dt_p, dt_c, K, R, BP
    )
    while block < blocks * batch:
        next_dv, next_dt = _block_of(
            block + chunks,
            blocks * batch,
            blocks,
            k,
            c,
            r,
            real,
            dv_ptr,
            dt_ptr,
            positions,
            channels,
            dt_b,
            dt_k,
            dt_p,
            dt_c,
            K,
            R,
            BP,
        )
        dt = dt.to(tl.float32)
        if SPLIT:
            ddt = tl.dot(dv, weight, input_precision="tf32")
            high, low = split_weight(dv)
            dweight = tl.dot(dt, low, dweight, input_precision="tf32")
            dweight = tl.dot(dt, high, dweight, input_precision="tf32")
        else:
            ddt = tl.dot(dv, weight, input_precision="ieee")
            dweight = tl.dot(dt, dv, dweight, input_precision="ieee")
        image = (block // blocks).to(tl.int64)
        p = (block % blocks) * BP + tl.arange(0, BP)
        ddt_at = ddt_ptr + image * ddt_b + k * ddt_k + p[:, None].to(tl.int64) * ddt_p + r[None, :] * ddt_c
        tl.store(ddt_at, ddt, mask=(p[:, None] < positions) & (r[None, :] < R))
        dv, dt = next_dv, next_dt
        block += chunks
    at = ((chunk * K + k) * channels + c[None, :]) * R + r[:, None]
    tl.store(parts_ptr + at, dweight, mask=(r[:, None] < R) & real[None, :])
