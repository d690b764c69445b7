# ruff: noqa: ANN001, ANN201, SIM102  (Triton reads annotations as its own)
"""The forward scan kernel."""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    fetch,
    full_step,
    load_weight,
    path_code,
    path_length,
    pick_row,
    scan_states,
    softplus,
    tile_places,
)


@triton.jit
def scan_forward_kernel(
    x_ptr, dt_ptr, b_ptr, c_ptr, z_ptr, A_ptr, D_ptr, weight_ptr, bias_ptr,
    y_ptr, states_ptr, last_ptr, total_ptr,
    height, width, channels, tiles, tiles_per_split, splits,
    x_b, x_k, x_p, x_c, dt_b, dt_k, dt_p, dt_c, b_b, b_k, b_p, b_n, c_b, c_k, c_p, c_n,
    z_b, z_k, z_p, z_c, y_b, y_k, y_p, y_c,
    PATHS: tl.constexpr, WINDOWS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PACKED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT_DOT: tl.constexpr,
    SUMMARY: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One program walks one path of one image, for BC channels, tile by tile, over one split of the path.

    `states` (batch, K, tiles, N, C) receives the state before every tile; where a split starts inside the path it must already
    hold the state there. With SUMMARY nothing but the split's end state, from zero (in `states`, (batch, K, splits, N, C)), and its
    sum of delta. One state variable is carried in registers, more are carried through `states`, in a loop over them.
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
    y_ptr += batch * y_b + k * y_k + c[None, :].to(tl.int64) * y_c
    dt_ptr += batch * dt_b + k * dt_k
    if PACKED:
        b_ptr = dt_ptr + RANK
        c_ptr = dt_ptr + RANK + N
    else:
        b_ptr += batch * b_b + k * b_k
        c_ptr += batch * c_b + k * c_k
    kc = k * channels + c
    A_ptr += k * N * channels + c
    last_ptr += (batch * K + k) * N * channels + c
    tile = split * tiles_per_split
    end = tl.minimum(tile + tiles_per_split, tiles)
    if SUMMARY:
        slot: tl.constexpr = 0
        states_ptr += ((batch * K + k) * splits + split) * N * channels + c
    else:
        slot = N * channels
        states_ptr += ((batch * K + k) * tiles + tile) * slot + c

    zero = tl.zeros([BC], tl.float32)
    h = zero
    if SUMMARY or split == 0:
        n = 0
        while n < N:
            tl.store(states_ptr + n * channels, h, mask=real)
            n += 1
    if N == 1:
        A = tl.load(A_ptr, mask=real, other=0.0).to(tl.float32) * LOG2E
        h = tl.load(states_ptr, mask=real, other=0.0)
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
    total = tl.zeros([BC], tl.float32)

    # Two tiles ahead positions are computed, one tile ahead its operands are read.
    p, exists, inside = tile_places(tile, end, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
    x, dt, B1, C1 = fetch(p, inside, c, r, real, x_ptr, dt_ptr, b_ptr, c_ptr, x_p, dt_p, dt_c, b_p, c_p, N, R)
    p1, exists1, inside1 = tile_places(tile + 1, end, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
    while tile < end:  # not `for`: there Triton moves the weight's conversion to the tensor cores' layout into the loop
        x1, dt1, B11, C11 = fetch(p1, inside1, c, r, real, x_ptr, dt_ptr, b_ptr, c_ptr, x_p, dt_p, dt_c, b_p, c_p, N, R)
        p2, exists2, inside2 = tile_places(tile + 2, end, i, kind, flip, length, height, width, WINDOWS, WIDE, BT)
        here = (inside != 0)[:, None] & real[None, :]
        x = x.to(tl.float32)
        v = full_step(dt, high, low, bias, weight_ptr, r, real, channels_r, SPLIT_DOT, R, BT, BC)
        if SOFTPLUS:
            v, _ = softplus(v)
        delta = v
        if LAST:  # steps after the end of a path change nothing else
            delta = tl.where((exists != 0)[:, None], v, 0.0)
        dx = delta * x
        if SUMMARY:
            total += tl.sum(delta, 0)
        y = D[None, :] * x
        if HAS_Z:
            z = tl.load(z_ptr + batch * z_b + k * z_k + p[:, None] * z_p + c[None, :] * z_c, mask=here, other=0.0)
        if N == 1:
            B, C = B1, C1
        else:
            A = tl.load(A_ptr, mask=real, other=0.0).to(tl.float32) * LOG2E
            h = tl.load(states_ptr, mask=real, other=0.0)
            B = tl.load(b_ptr + p * b_p, mask=inside != 0, other=0.0)
            C = tl.load(c_ptr + p * c_p, mask=inside != 0, other=0.0)
        n = 0
        while n < N:
            if N > 1:  # the operands of the next state variable are read while this one is computed
                m = n + 1
                more = real & (m < N)
                on = (inside != 0) & (m < N)
                next_A = tl.load(A_ptr + m * channels, mask=more, other=0.0).to(tl.float32) * LOG2E
                next_h = tl.load(states_ptr + m * channels, mask=more, other=0.0)
                next_B = tl.load(b_ptr + p * b_p + m * b_n, mask=on, other=0.0)
                next_C = tl.load(c_ptr + p * c_p + m * c_n, mask=on, other=0.0)
            a = tl.exp2(delta * A[None, :])
            state = scan_states(a, dx * B.to(tl.float32)[:, None], h[None, :], row == 0)
            if not SUMMARY:
                y += state * C.to(tl.float32)[:, None]
            h = pick_row(state, row == BT - 1)
            if SUMMARY or tile + 1 < end:
                tl.store(states_ptr + slot + n * channels, h, mask=real)
            elif LAST:
                if end == tiles:
                    tl.store(last_ptr + n * channels, h, mask=real)
            if N > 1:
                A, h, B, C = next_A, next_h, next_B, next_C
            n += 1
        if not SUMMARY:
            if HAS_Z:
                z = z.to(tl.float32)
                y = y * z / (1.0 + tl.exp2(-z * LOG2E))
            tl.store(y_ptr + p[:, None] * y_p, y, mask=here)
        states_ptr += slot
        tile += 1
        p, exists, inside, p1, exists1, inside1, x, dt = p1, exists1, inside1, p2, exists2, inside2, x1, dt1
        if N == 1:
            B1, C1 = B11, C11
    if SUMMARY:
        tl.store(total_ptr + ((batch * K + k) * splits + split) * channels + c, total, mask=real)
