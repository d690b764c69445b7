# ruff: noqa: ANN001, ANN201  (Triton reads annotations as its own)
"""The backward scan kernel: recomputes the states of a tile from the one saved at its start, then walks the tiles back."""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    fetch,
    full_step,
    load_weight,
    path_code,
    path_length,
    scan_gradients,
    scan_states_decayed,
    softplus,
    tile_places,
)


@triton.jit
def scan_backward_kernel(
    dy_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, z_ptr, A_ptr, D_ptr, weight_ptr, bias_ptr, states_ptr,
    dx_ptr, ddt_ptr, db_ptr, dc_ptr, dz_ptr, dA_ptr, dD_ptr, dbias_ptr, carry_ptr, total_ptr,
    height, width, channels, tiles, tiles_per_split, splits,
    dy_b, dy_k, dy_p, dy_c, x_b, x_k, x_p, x_c, dt_b, dt_k, dt_p, dt_c, b_b, b_k, b_p, b_n, c_b, c_k, c_p, c_n,
    z_b, z_k, z_p, z_c, dx_b, dx_k, dx_p, dx_c, sums_part, ddt_b, ddt_k, ddt_p, ddt_c, db_block, db_b, db_k, db_p, db_n,
    PATHS: tl.constexpr, WINDOWS: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    RANK: tl.constexpr, PACKED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT_DOT: tl.constexpr,
    SUMMARY: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One program walks one path of one image backwards, for BC channels, from its last tile to its first.

    With g = dL/dh: g[t] = C[t] dy[t] + a[t+1] g[t+1]. `ddt` receives the gradient of the full step before
    softplus (projection.py takes it through a low-rank step). Sums over channels (dB, dC) are written per channel block, sums over
    positions (dA, dD, dbias) per image and split; the launcher adds them up in a fixed order. With SUMMARY nothing is written but
    what each split hands to the one before it.
    """
    K: tl.constexpr = len(PATHS)
    blocks = (channels + BC - 1) // BC
    pid = tl.program_id(0)
    block = pid % blocks
    rest = pid // blocks
    k = rest % K
    rest = rest // K
    split = rest % splits
    batch = (rest // splits).to(tl.int64)
    kind, flip = path_code(PATHS, k)
    length = path_length(kind, height, width)
    k = k.to(tl.int64)  # a path's part of a tensor may begin beyond 2^31 elements

    c = tl.max_contiguous(tl.multiple_of(block * BC + tl.arange(0, BC), VEC), BC)  # VEC adjacent channels a lane
    real = c < channels
    i = tl.arange(0, BT)
    row = i[:, None]
    x_ptr += batch * x_b + k * x_k + c[None, :].to(tl.int64) * x_c
    dy_ptr += batch * dy_b + k * dy_k + c[None, :].to(tl.int64) * dy_c
    dx_ptr += batch * dx_b + k * dx_k + c[None, :].to(tl.int64) * dx_c
    dt_ptr += batch * dt_b + k * dt_k
    ddt_ptr += batch * ddt_b + k * ddt_k
    db_ptr += block.to(tl.int64) * db_block + batch * db_b + k * db_k
    dc_ptr += block.to(tl.int64) * db_block + batch * db_b + k * db_k
    if PACKED:
        b_ptr = dt_ptr + RANK
        c_ptr = dt_ptr + RANK + N
    else:
        b_ptr += batch * b_b + k * b_k
        c_ptr += batch * c_b + k * c_k
    kc = k * channels + c
    part = (batch * splits + split) * sums_part  # where this program's sums over positions go
    A_ptr += k * N * channels + c
    dA_ptr += part + k * N * channels + c
    carry_ptr += ((batch * K + k) * splits + split) * N * channels + c
    first = split * tiles_per_split
    tile = tl.minimum(first + tiles_per_split, tiles) - 1
    states_ptr += ((batch * K + k) * tiles + tile) * N * channels + c

    zero = tl.zeros([BC], tl.float32)
    n = 0
    while n < N:
        if SUMMARY or split == splits - 1:
            tl.store(carry_ptr + n * channels, zero, mask=real)
        if not SUMMARY:
            tl.store(dA_ptr + n * channels, zero, mask=real)
        n += 1
    if N == 1:
        A = tl.load(A_ptr, mask=real, other=0.0).to(tl.float32)
        carry = tl.load(carry_ptr, mask=real, other=0.0)
        dA = zero
    D = tl.zeros([BC], tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + kc, mask=real, other=0.0).to(tl.float32)
    bias = tl.zeros([BC], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + kc, mask=real, other=0.0).to(tl.float32)
    r = tl.arange(0, 16)
    channels_r = kc[None, :] * R
    if R > 0:
        high, low = load_weight(weight_ptr, r, real, channels_r, 0, R)
    else:
        high, low = zero, zero
    dD = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    total = tl.zeros([BC], tl.float32)

    # Two tiles ahead positions are computed, one tile ahead its operands are read.
    p, exists, inside = tile_places(tile, tiles, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
    x, dt, B1, C1 = fetch(p, inside, c, r, real, x_ptr, dt_ptr, b_ptr, c_ptr, x_p, dt_p, dt_c, b_p, c_p, N, R)
    dy = tl.load(dy_ptr + p[:, None] * dy_p, mask=(inside != 0)[:, None] & real[None, :], other=0.0)
    p1, exists1, inside1 = tile_places(tl.maximum(tile - 1, 0), tiles, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
    while tile >= first:
        x1, dt1, B11, C11 = fetch(p1, inside1, c, r, real, x_ptr, dt_ptr, b_ptr, c_ptr, x_p, dt_p, dt_c, b_p, c_p, N, R)
        dy1 = tl.load(dy_ptr + p1[:, None] * dy_p, mask=(inside1 != 0)[:, None] & real[None, :], other=0.0)
        p2, exists2, inside2 = tile_places(tl.maximum(tile - 2, 0), tiles, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
        on_map = inside != 0
        here = on_map[:, None] & real[None, :]
        x = x.to(tl.float32)
        dy = dy.to(tl.float32)
        v = full_step(dt, high, low, bias, weight_ptr, r, real, channels_r, SPLIT_DOT, R, BT, BC)
        if SOFTPLUS:
            delta, u = softplus(v)
        else:
            delta = v
        delta = tl.where((exists != 0)[:, None], delta, 0.0)  # after the end of a path nothing decays, nor overflows
        if HAS_Z:
            z = tl.load(z_ptr + batch * z_b + k * z_k + p[:, None] * z_p + c[None, :] * z_c, mask=here, other=0.0).to(tl.float32)
            gate = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
            dout = dy
            dy = dout * z * gate
        if SUMMARY:
            total += tl.sum(delta, 0)
        else:
            xd = delta * x
            y = D[None, :] * x
            gB = tl.zeros([BT, BC], tl.float32)
            ddelta = tl.zeros([BT, BC], tl.float32)
        if N == 1:
            B, C = B1, C1
        else:
            A = tl.load(A_ptr, mask=real, other=0.0).to(tl.float32)
            carry = tl.load(carry_ptr, mask=real, other=0.0)
            C = tl.load(c_ptr + p * c_p, mask=on_map, other=0.0)
            if not SUMMARY:
                B = tl.load(b_ptr + p * b_p, mask=on_map, other=0.0)
                h0 = tl.load(states_ptr, mask=real, other=0.0)
                dA = tl.load(dA_ptr, mask=real, other=0.0)
        n = 0
        while n < N:
            if N > 1:  # the operands of the next state variable are read while this one is computed
                m = n + 1
                more = real & (m < N)
                on = on_map & (m < N)
                next_A = tl.load(A_ptr + m * channels, mask=more, other=0.0).to(tl.float32)
                next_carry = tl.load(carry_ptr + m * channels, mask=more, other=0.0)
                next_C = tl.load(c_ptr + p * c_p + m * c_n, mask=on, other=0.0)
                if not SUMMARY:
                    next_B = tl.load(b_ptr + p * b_p + m * b_n, mask=on, other=0.0)
                    next_h0 = tl.load(states_ptr + m * channels, mask=more, other=0.0)
                    next_dA = tl.load(dA_ptr + m * channels, mask=more, other=0.0)
            a = tl.exp2(delta * (A * LOG2E)[None, :])
            g, carry = scan_gradients(a, dy * C.to(tl.float32)[:, None], carry, row, BT)
            if N > 1:
                tl.store(carry_ptr + n * channels, carry, mask=real)
            if not SUMMARY:
                if N == 1:
                    h0 = tl.load(states_ptr, mask=real, other=0.0)
                b = B.to(tl.float32)[:, None]
                h, decayed = scan_states_decayed(a, xd * b, h0[None, :], row == 0)
                decayed = g * decayed
                ddelta += decayed * A[None, :]
                gB += g * b
                dA += tl.sum(decayed * delta, 0)
                if N > 1:
                    tl.store(dA_ptr + n * channels, dA, mask=real)
                tl.store(db_ptr + p * db_p + n * db_n, tl.sum(g * xd, 1), mask=on_map)
                tl.store(dc_ptr + p * db_p + n * db_n, tl.sum(dy * h, 1), mask=on_map)
                if HAS_Z:
                    y += h * C.to(tl.float32)[:, None]
            if N > 1:
                A, carry, C = next_A, next_carry, next_C
                if not SUMMARY:
                    B, h0, dA = next_B, next_h0, next_dA
            n += 1
        if not SUMMARY:
            dx = gB * delta + D[None, :] * dy
            tl.store(dx_ptr + p[:, None] * dx_p, dx, mask=here)
            dD += tl.sum(dy * x, 0)
            dv = ddelta + gB * x
            if SOFTPLUS:
                dv = dv * tl.where(v > 0.0, 1.0, u) / (1.0 + u)
            if HAS_BIAS:
                dbias += tl.sum(dv, 0)
            if HAS_Z:
                dz = dout * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + batch * dx_b + k * dx_k + p[:, None] * dx_p + c[None, :].to(tl.int64) * dx_c, dz, mask=here)
            tl.store(ddt_ptr + p[:, None] * ddt_p + c[None, :] * ddt_c, dv, mask=here)
        states_ptr -= N * channels
        tile -= 1
        p, exists, inside, p1, exists1, inside1 = p1, exists1, inside1, p2, exists2, inside2
        x, dy, dt = x1, dy1, dt1
        if N == 1:
            B1, C1 = B11, C11

    if N == 1:
        if SUMMARY:
            tl.store(carry_ptr, carry, mask=real)
        else:
            tl.store(dA_ptr, dA, mask=real)
    if SUMMARY:
        tl.store(total_ptr + ((batch * K + k) * splits + split) * channels + c, total, mask=real)
    else:
        if HAS_D:
            tl.store(dD_ptr + part + kc, dD, mask=real)
        if HAS_BIAS:
            tl.store(dbias_ptr + part + kc, dbias, mask=real)
