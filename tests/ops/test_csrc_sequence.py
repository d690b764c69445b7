"""`selective_scan`'s CUDA C++ kernels against the reference in float64: on a GPU, or emulated on a CPU (with TRITON_INTERPRET=1).

test_triton.py runs this file in an interpreting process of its own, as it does test_csrc_kernels.py.
"""

import pytest
import torch
from test_csrc_kernels import BF16, DEVICE, F16, broken, kernels, pytestmark  # noqa: F401

from visionssm.ops import selective_scan, selective_scan_ref
from visionssm.ops.testing import assert_within_budget, outputs_and_gradients, selective_scan_inputs, to_float64

FORWARD, BACKWARD, SPREAD, TILES = "sequence_forward", "sequence_backward", "sequence_spread", "sequence_tiles"
LANES = {FORWARD: 1, SPREAD: 8, TILES: 16}


@pytest.fixture
def plan(monkeypatch):
    """Cut up the work as a test wants it, whatever the device."""

    def choose(channels=32, tiles_per_split=1000, kernel=FORWARD, forward_channels=8):
        from visionssm.ops.kernels import sequence

        backward = sequence.Plan(BACKWARD, channels, tiles_per_split)
        threads = sequence.Plan(FORWARD, channels, tiles_per_split)
        forward = threads if kernel == FORWARD else sequence.Plan(kernel, forward_channels, 1000, LANES[kernel])
        monkeypatch.setattr(sequence, "backward_plan", lambda *sizes: backward)
        monkeypatch.setattr(sequence, "forward_plan", lambda *sizes: forward)

    return choose


def check(inputs, softplus=True):
    def op(**tensors):
        return selective_scan(**tensors, delta_softplus=softplus, backend="triton")

    def reference(**tensors):
        return selective_scan_ref(**tensors, delta_softplus=softplus)

    low, high = outputs_and_gradients(reference, inputs), outputs_and_gradients(reference, to_float64(inputs))
    actual = outputs_and_gradients(op, inputs)
    assert actual.keys() == high.keys()
    for name in high:
        assert_within_budget(actual[name], low[name], high[name], name)


@pytest.mark.parametrize(
    ("sizes", "options", "softplus"),
    [
        ((1, 24, 19, 16), {"dtype": BF16}, True),
        ((2, 32, 1, 8), {"dtype": F16, "groups": 1}, True),
        ((1, 160, 37, 4), {"dtype": BF16, "groups": 2, "z": False}, True),
        ((1, 40, 18, 16), {"dtype": F16, "D": False, "delta_bias": False, "step_range": (1e-3, 0.1)}, True),
        ((1, 8, 50, 16), {"dtype": BF16, "groups": 4, "D": False}, False),
        ((1, 3, 197, 16), {"dtype": F16, "delta_bias": False}, False),
        ((1, 128, 33, 16), {"dtype": BF16, "step_range": (1e-3, 0.1)}, True),
        ((1, 40, 34, 32), {"dtype": F16}, True),
        ((1, 33, 33, 5), {"dtype": BF16}, True),
    ],
    ids=str,
)
def test_sequence(kernels, plan, sizes, options, softplus):  # noqa: F811
    plan(channels=128 if sizes[1] >= 128 else 32)
    batch, dim, length, state = sizes
    check(selective_scan_inputs(batch, dim, length, state, softplus=softplus, device=DEVICE, **options), softplus)
    assert kernels == [FORWARD, BACKWARD]


@pytest.mark.parametrize(
    ("sizes", "options", "softplus"),
    [
        ((1, 24, 19, 16), {"dtype": BF16}, True),
        ((2, 8, 1, 16), {"dtype": F16, "groups": 1}, True),
        ((1, 32, 37, 16), {"dtype": BF16, "groups": 2, "z": False}, True),
        ((1, 40, 18, 16), {"dtype": F16, "D": False, "delta_bias": False, "step_range": (1e-3, 0.1)}, True),
        ((2, 32, 64, 16), {"dtype": BF16, "groups": 4, "D": False}, False),
        ((1, 16, 197, 16), {"dtype": F16}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [SPREAD, TILES])
def test_lanes_that_share_a_channel(kernels, plan, kernel, sizes, options, softplus):  # noqa: F811
    plan(kernel=kernel)
    batch, dim, length, state = sizes
    check(selective_scan_inputs(batch, dim, length, state, softplus=softplus, device=DEVICE, **options), softplus)
    assert kernels == [kernel, BACKWARD]


@pytest.mark.parametrize(("kernel", "channels"), [(SPREAD, 16), (SPREAD, 24), (SPREAD, 32), (TILES, 16), (TILES, 24)])
def test_blocks_of_lanes(kernels, plan, kernel, channels):  # noqa: F811
    plan(kernel=kernel, forward_channels=channels)
    check(selective_scan_inputs(2, 96, 53, 16, z=channels < 24, device=DEVICE, dtype=F16))
    assert kernels == [kernel, BACKWARD]


@pytest.mark.parametrize("length", [255, 256, 257, 512, 520, 773, 1031])
def test_chunks(kernels, plan, length):  # noqa: F811
    """Whole chunks and the rest of one, in rows that start anywhere in sixteen bytes."""
    plan(kernel=TILES)
    inputs = selective_scan_inputs(1, 8, length, 16, groups=1, device=DEVICE, dtype=BF16)
    high = selective_scan_ref(**to_float64(inputs), delta_softplus=True)
    low = selective_scan_ref(**inputs, delta_softplus=True)
    assert_within_budget(selective_scan(**inputs, delta_softplus=True, backend="triton"), low, high, "y")
    assert kernels == [TILES]


@pytest.mark.parametrize(("batch", "channels", "block"), [(8, 384, 24), (1, 384, 8), (1, 40, 8), (32, 768, 32), (3, 352, 8)])
def test_the_blocks_of_spread_states(batch, channels, block):
    from visionssm.ops.kernels.sequence import spread_plan

    assert spread_plan(batch, 1, channels, 6085, processors=132).channels == block


@pytest.mark.parametrize(
    ("batch", "channels", "shared_memory", "block"),
    [
        (8, 384, 232448, 24),
        (5, 384, 232448, 16),
        (8, 512, 232448, 16),
        (2, 384, 232448, 8),
        (8, 384, 166912, 8),  # what smaller GPUs have
        (8, 384, 101376, None),
    ],
)
def test_the_blocks_of_tiles(batch, channels, shared_memory, block):
    from visionssm.ops.kernels.sequence import tiles_plan

    plan, _ = tiles_plan(batch, 1, channels, 6085, processors=132, shared_memory=shared_memory)
    assert (plan and plan.channels) == block


@pytest.mark.parametrize("kernel", [FORWARD, SPREAD, TILES])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_states_that_cancel(kernels, plan, dtype, kernel):  # noqa: F811
    """Equal states whose shares of y add up to a hundredth of each: the sum over them is to float32's accuracy."""
    plan(kernel=kernel)
    inputs = selective_scan_inputs(1, 8, 37, 16, D=False, z=False, dtype=dtype, device=DEVICE)
    inputs["A"] = inputs["A"][:, :1].expand(-1, 16).contiguous()
    inputs["B"] = inputs["B"][:, :1].expand(-1, 16, -1).contiguous()
    inputs["C"] = inputs["C"].sign() + 2.0**-7
    inputs["C"][:, 8:] = -inputs["C"][:, :8].sign()
    low, high = (selective_scan_ref(**t, delta_softplus=True) for t in (inputs, to_float64(inputs)))
    y = selective_scan(**inputs, delta_softplus=True, backend="triton")
    assert_within_budget(y, low, high, "y")
    assert kernels == [kernel]


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gradients_that_cancel(kernels, dtype):  # noqa: F811
    """Equal channels, but for u, half of which has the other sign and is a hundredth smaller: dB and dC to float32's accuracy."""
    inputs = selective_scan_inputs(1, 8, 37, 16, D=False, z=False, dtype=dtype, device=DEVICE)
    for name, axis in (("A", 0), ("delta_bias", 0), ("delta", 1)):
        inputs[name] = inputs[name].narrow(axis, 0, 1).expand_as(inputs[name]).contiguous()
    inputs["u"] = inputs["u"][:, :1] * torch.tensor([1.0 + 2.0**-7, -1.0], dtype=dtype, device=DEVICE).repeat(4)[:, None]

    def gradients(op, tensors, **options):
        leaves = tensors | {name: tensors[name].clone().requires_grad_() for name in "BC"}
        return torch.autograd.grad(op(**leaves, delta_softplus=True, **options).sum(), [leaves[name] for name in "BC"])

    low, high = gradients(selective_scan_ref, inputs), gradients(selective_scan_ref, to_float64(inputs))
    for name, *results in zip("BC", gradients(selective_scan, inputs, backend="triton"), low, high, strict=True):
        assert_within_budget(*results, f"d{name}")
    assert kernels[-1] == BACKWARD


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_blocks(kernels, plan, channels):  # noqa: F811
    plan(channels)
    check(selective_scan_inputs(1, 40, 69, 16, device=DEVICE, dtype=BF16))
    assert kernels == [FORWARD, BACKWARD]


@pytest.mark.parametrize("tiles_per_split", [1, 2, 4])
def test_split_sequence(kernels, plan, tiles_per_split):  # noqa: F811
    plan(32, tiles_per_split)
    check(selective_scan_inputs(2, 24, 101, 8, groups=2, device=DEVICE, dtype=F16))
    assert kernels == [FORWARD, FORWARD, BACKWARD, BACKWARD]


CUTS = [(4, {}), (4, {"tiles_per_split": 1}), (16, {"kernel": SPREAD}), (16, {"kernel": TILES})]


@pytest.mark.parametrize(("state", "cut"), CUTS, ids=str)
def test_without_a_gradient_no_states_are_kept(kernels, plan, state, cut):  # noqa: F811
    plan(**cut)
    inputs = selective_scan_inputs(2, 16, 37, state, groups=2, device=DEVICE, dtype=F16)
    expected = selective_scan(**inputs, delta_softplus=True, backend="triton")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    operands = [inputs[name].requires_grad_() for name in names]
    with torch.no_grad():
        y = selective_scan(*operands, delta_softplus=True, backend="triton")
    assert torch.equal(y, expected)
    y, _, states = torch.ops.visionssm.selective_scan(*operands, True, False, False)
    assert states.numel() == 0
    with pytest.raises(RuntimeError, match="no gradient of a selective_scan"):
        y.sum().backward()


@pytest.mark.parametrize(("state", "cut"), CUTS, ids=str)
@pytest.mark.parametrize("length", [21, 32])
def test_last_state(kernels, plan, state, cut, length):  # noqa: F811
    plan(**cut)
    inputs = selective_scan_inputs(2, 16, length, state, groups=2, device=DEVICE, dtype=F16)
    _, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="triton")
    _, expected = selective_scan_ref(**to_float64(inputs), delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-6)
    assert kernels[0] == cut.get("kernel", FORWARD)


@pytest.mark.parametrize(("state", "kernel"), [(4, FORWARD), (16, SPREAD), (16, TILES)])
def test_strided_operands(kernels, plan, state, kernel):  # noqa: F811
    """u and z are halves of one map, B and C slices of one projection: read where they lie."""
    plan(kernel=kernel)
    inputs = selective_scan_inputs(2, 24, 21, state, groups=1, device=DEVICE, dtype=BF16)
    expected = selective_scan(**inputs, delta_softplus=True, backend="triton")
    inputs["u"], inputs["z"] = torch.cat([inputs["u"], inputs["z"]], dim=1).chunk(2, dim=1)
    inputs["B"], inputs["C"] = torch.cat([inputs["B"], inputs["C"]], dim=2).chunk(2, dim=2)
    assert not any(inputs[name].is_contiguous() for name in ("u", "z", "B", "C"))
    assert torch.equal(selective_scan(**inputs, delta_softplus=True, backend="triton"), expected)
    assert kernels == 2 * [kernel]


@pytest.mark.parametrize(
    ("n", "batch", "channels", "length", "kernel"),
    [
        (16, 1, 384, 197, SPREAD),
        (16, 32, 384, 197, SPREAD),
        (16, 256, 384, 197, FORWARD),  # enough channels
        (16, 1, 384, 6085, FORWARD),  # in splits
        (16, 4, 384, 6085, FORWARD),
        (16, 5, 384, 6085, TILES),
        (16, 8, 384, 6085, TILES),
        (16, 9, 384, 6085, TILES),  # in blocks of 16, in two rounds
        (16, 16, 384, 6085, TILES),
        (16, 16, 388, 6085, FORWARD),
        (8, 1, 384, 197, FORWARD),
        (16, 1, 388, 197, FORWARD),
    ],
)
def test_the_plan_of_the_forward(n, batch, channels, length, kernel):
    from visionssm.ops.kernels.sequence import forward_plan

    assert forward_plan(n, batch, 1, channels, length, processors=132).kernel == kernel


def test_bitwise_repeatable(kernels):  # noqa: F811
    inputs = selective_scan_inputs(1, 40, 37, 4, device=DEVICE, dtype=F16)
    first, second = (outputs_and_gradients(selective_scan, inputs, backend="triton", delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert kernels.count(BACKWARD) >= 2


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(kernels, optional):  # noqa: F811
    inputs = selective_scan_inputs(1, 4, 5, 4, 2, D=optional, z=optional, delta_bias=optional, device=DEVICE, dtype=BF16)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    operands = (None if inputs[name] is None else inputs[name].requires_grad_() for name in names)
    torch.library.opcheck(torch.ops.visionssm.selective_scan.default, (*operands, True, True, True))
    assert FORWARD in kernels


def test_channels_last_maps_are_left_to_triton(kernels):  # noqa: F811
    inputs = selective_scan_inputs(1, 4, 5, 4, device=DEVICE, dtype=F16)
    inputs["u"] = inputs["u"].mT.contiguous().mT
    selective_scan(**inputs, delta_softplus=True, backend="triton")
    assert kernels == []


@pytest.mark.parametrize("tiles_per_split", [1000, 1])
@pytest.mark.parametrize(
    ("fails", "serves"),
    [(FORWARD, BACKWARD), (BACKWARD, FORWARD), (SPREAD, BACKWARD), (BACKWARD, SPREAD), (TILES, BACKWARD), (BACKWARD, TILES)],
    ids=str,
)
def test_triton_serves_in_place_of_a_kernel_that_does_not_compile(kernels, broken, plan, fails, serves, tiles_per_split):  # noqa: F811
    """One direction by Triton, the other from csrc: they keep the same states."""
    plan(tiles_per_split=tiles_per_split, kernel=next((k for k in (SPREAD, TILES) if k in (fails, serves)), FORWARD))
    broken(fails)
    check(selective_scan_inputs(2, 48, 37, 16, groups=2, device=DEVICE, dtype=F16))
    assert set(kernels) == {serves}
