# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (Triton reads annotations as its own)
"""Device functions that the scan kernels share: where a path goes, the step delta, the recurrence on a tile.

A tile is `[BT steps, BC channels]` with the steps inside a thread and the channels across lanes, so that a scan along the steps is
plain sequential code. Triton writes it as an associative scan; with one operand constant-folded the compiler reduces it to one FMA
a step.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
STEPS = 16
"""Positions in a tile, csrc's T as well; the states at tile boundaries are what the backward keeps."""


@triton.jit
def path_code(PATHS: tl.constexpr, k):
    """Kind and flip of path k from its code `2 * kind + flip`: kind 0 is h, 1 is v, K + 1 is wK."""
    code = 0
    for j in tl.static_range(len(PATHS)):
        code = tl.where(k == j, PATHS[j], code)
    return code // 2, code % 2


@triton.jit
def path_length(kind, height, width):
    """Steps of a path, window padding included."""
    w = tl.maximum(kind - 1, 1)
    return tl.where(kind < 2, height * width, ((height + w - 1) // w) * ((width + w - 1) // w) * w * w)


@triton.jit
def tile_positions(tile, i, kind, flip, length, height, width, WINDOWS: tl.constexpr, BT: tl.constexpr):
    """Raster positions of the steps `tile * BT + i`, which steps exist, and which of them lie on the map."""
    step = tile * BT + i
    exists = step < length
    p = tl.where(exists, tl.where(flip == 1, length - 1 - step, step), 0)
    col = p // height
    position = tl.where(kind == 1, (p - col * height) * width + col, p)
    inside = exists
    if WINDOWS:
        w = tl.maximum(kind - 1, 1)
        across = (width + w - 1) // w
        window = p // (w * w)
        rest = p - window * w * w
        row = (window // across) * w + rest // w
        col = (window % across) * w + rest % w
        position = tl.where(kind >= 2, row * width + col, position)
        inside = exists & ((kind < 2) | ((row < height) & (col < width)))
    return position, exists, inside


@triton.jit
def tile_places(tile, end, i, kind, flip, length, height, width, WINDOWS: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr):
    """`tile_positions` in a form to carry through a loop: a tile at or after `end` has no steps, masks are 0 and 1."""
    p, exists, inside = tile_positions(tile, i, kind, flip, length, height, width, WINDOWS, BT)
    if WIDE:
        p = p.to(tl.int64)
    return p, (exists & (tile < end)).to(tl.int32), (inside & (tile < end)).to(tl.int32)


@triton.jit
def fetch(p, inside, c, r, real, x_ptr, dt_ptr, b_ptr, c_ptr, x_p, dt_p, dt_c, b_p, c_p, N: tl.constexpr, R: tl.constexpr):
    """Start reading a tile: x, dt (low-rank in pieces of 16), and B and C if N = 1.

    Nothing is converted here, so that the reads go on while another tile is computed.
    """
    inside = inside != 0
    here = inside[:, None] & real[None, :]
    x = tl.load(x_ptr + p[:, None] * x_p, mask=here, other=0.0)
    if R > 0:
        dt = ()
        for j in tl.static_range((R + 15) // 16):
            rank = 16 * j + r[None, :]
            dt = dt + (tl.load(dt_ptr + p[:, None] * dt_p + rank * dt_c, mask=inside[:, None] & (rank < R), other=0.0),)
    else:
        dt = tl.load(dt_ptr + p[:, None] * dt_p + c[None, :] * dt_c, mask=here, other=0.0)
    if N == 1:
        B = tl.load(b_ptr + p * b_p, mask=inside, other=0.0)
        C = tl.load(c_ptr + p * c_p, mask=inside, other=0.0)
    else:
        B, C = p, p
    return x, dt, B, C


@triton.jit
def softplus(v):
    """log(1 + exp(v)) and u = exp(-|v|): a polynomial for log1p(u) / u on [0, 1], relative error 3e-8, no logarithm."""
    u = tl.exp2(tl.abs(v) * -LOG2E)
    p = u * 0.00536481384 - 0.0300657507
    p = p * u + 0.0792044699
    p = p * u - 0.137537971
    p = p * u + 0.191536516
    p = p * u - 0.248571634
    p = p * u + 0.33321324
    p = p * u - 0.499996483
    p = p * u + 1.0
    return p * u + tl.maximum(v, 0.0), u


@triton.jit
def step(a1, h1, a2, h2):
    """Two pieces of the recurrence h = a h + b as one."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def scan_states(a, b, h0, first):
    """h[t] = a[t] h[t-1] + b[t] down the rows, from `h0` before row 0; `first` marks that row."""
    b = tl.where(first, a * h0 + b, b)
    _, h = tl.associative_scan((a, b), 0, step)
    return h


@triton.jit
def _step_with_decayed(a1, h1, e1, a2, h2, e2):
    return a1 * a2, a2 * h1 + h2, a2 * h1 + e2


@triton.jit
def scan_states_decayed(a, b, h0, first):
    """`scan_states`, and a[t] h[t-1] beside it."""
    e = tl.where(first, a * h0, -0.0)
    b = tl.where(first, a * h0 + b, b)
    _, h, e = tl.associative_scan((a, b, e), 0, _step_with_decayed)
    return h, e


@triton.jit
def pick_row(m, row):
    """The one row of `m` that the mask `row` marks; exact, and free where rows are registers."""
    bits = m.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(row, bits, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _second_pair(a1, c1, a2, c2):
    return a2, c2


@triton.jit
def scan_gradients(a, c, carry, row, BT: tl.constexpr):
    """g[t] = c[t] + a[t+1] g[t+1] up the rows, with `carry` = a g of the row after the last; returns g and the carry of row 0.

    Written out row by row: Triton's reverse scan flips all lanes by shuffles, though every row is a register here.
    """
    if not INTERPRETED:
        a, c = tl.associative_scan((a, c), 0, _second_pair)  # does nothing but bring both to one layout
    g = c
    for j in tl.static_range(BT):
        here = row == BT - 1 - j
        now = pick_row(c, here) + carry
        g = tl.where(here, now[None, :], g)
        carry = pick_row(a, here) * now
    return g, carry


@triton.jit
def _second(first, second):
    return second


@triton.jit
def to_rows(m):
    """`m` unchanged; on a GPU a scan that does nothing, which keeps the layout `m` comes in from spreading past it."""
    if INTERPRETED:
        return m
    return tl.associative_scan(m, 0, _second)


@triton.jit
def split_weight(weight):
    """float32 as the sum of two tf32 numbers (to 21 bits)."""
    high = (weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, weight - high


@triton.jit
def load_weight(weight_ptr, r, real, channels_r, j: tl.constexpr, R: tl.constexpr):
    """Ranks 16 j to 16 j + 15 of the step's weight, as two tf32 parts [16, BC]."""
    rank = 16 * j + r[:, None]
    return split_weight(tl.load(weight_ptr + channels_r + rank, mask=(rank < R) & real[None, :], other=0.0).to(tl.float32))


@triton.jit
def expand_step(dt, high, low, v, SPLIT: tl.constexpr):
    """Sum v + dt [BT, 16] @ weight [16, BC] to float32 accuracy: on tensor cores if dt is 16-bit, else as plain FMAs."""
    dt = dt.to(tl.float32)
    if SPLIT:
        v = tl.dot(dt, low, v, input_precision="tf32")
        return tl.dot(dt, high, v, input_precision="tf32")
    return tl.dot(dt, high + low, v, input_precision="ieee")


@triton.jit
def full_step(
    dt, high, low, bias, weight_ptr, r, real, channels_r, SPLIT: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """The step before softplus [BT, BC]. A weight of over 16 ranks would fill the registers: it is read again, from L1."""
    if R == 0:
        return dt.to(tl.float32) + bias[None, :]
    v = tl.zeros([BT, BC], tl.float32) + bias[None, :]
    for j in tl.static_range((R + 15) // 16):
        if R > 16:
            high, low = load_weight(weight_ptr, r, real, channels_r, j, R)
        v = expand_step(dt[j], high, low, v, SPLIT)
    return to_rows(v)
