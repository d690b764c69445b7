"""The Triton kernels against the reference in float64: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1).

test_triton.py runs this file in an interpreting process of its own. Shapes are small and odd: interpreted programs are slow.
"""

import contextlib
import os

import pytest
import torch

from visionssm.ops import (
    CROSS,
    ScanPaths,
    backends,
    cross_selective_scan,
    cross_selective_scan_packed,
    cross_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from visionssm.ops.testing import (
    assert_within_budget,
    cross_selective_scan_inputs,
    outputs_and_gradients,
    pack,
    selective_scan_inputs,
    to_float64,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every tensor the launcher allocates starts as NaN, so that an element nothing writes cannot pass."""
    pytest.importorskip("triton")
    from visionssm.ops.kernels import launch

    def fill(make):
        def made(*args, **kwargs):
            return make(*args, **kwargs).fill_(float("nan"))

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))
    monkeypatch.setattr(launch.torch, "empty_like", fill(torch.empty_like))


@pytest.fixture
def splits(monkeypatch):
    """Set the number of tiles in a split, which otherwise depends on the device."""
    from visionssm.ops.kernels import launch

    def choose(tiles_per_split):
        monkeypatch.setattr(launch._Scan, "_splits", lambda self, programs, tiles: (-(-tiles // tiles_per_split), tiles_per_split))

    return choose


def check(op, reference, inputs):
    low, high = outputs_and_gradients(reference, inputs), outputs_and_gradients(reference, to_float64(inputs))
    actual = outputs_and_gradients(op, inputs)
    assert actual.keys() == high.keys()
    for name in high:
        assert_within_budget(actual[name], low[name], high[name], name)


def check_cross(size, paths, *, merge=True, op=cross_selective_scan, **options):
    inputs = cross_selective_scan_inputs(size=size, paths=paths, device=DEVICE, **options)
    check(
        lambda **tensors: op(**tensors, paths=paths, merge=merge, backend="triton"),
        lambda **tensors: cross_selective_scan_ref(**tensors, paths=ScanPaths(paths, size), merge=merge),
        inputs,
    )


@pytest.mark.parametrize(
    ("size", "paths", "options"),
    [
        ((3, 5), CROSS, {"dtype": BF16, "rank": 3}),
        ((1, 19), ("h", "h_flip"), {"dtype": F32, "shared": False}),
        ((5, 4), ("v_flip",), {"dtype": F16, "channels": 35, "batch": 1}),
        ((5, 3), ("w2", "w2_flip"), {"dtype": F32, "batch": 1}),
        ((4, 5), ("w7", "v"), {"dtype": BF16, "batch": 1, "rank": 17}),
        ((17, 1), ("v", "h"), {"dtype": F32, "D": False, "dt_bias": False, "state": 1, "batch": 1}),
        ((3, 6), ("h",), {"dtype": F32, "rank": None, "state": 3, "batch": 1}),
        ((1, 1), ("v", "h_flip"), {"dtype": F32, "state": 1, "batch": 1}),
        ((2, 5), ("v",), {"dtype": F16, "state": 16, "batch": 1, "channels": 40}),
    ],
    ids=str,
)
def test_map(size, paths, options):
    check_cross(size, paths, **{"state": 1, "channels": 24, **options})


def test_unmerged():
    check_cross((3, 5), ("h_flip", "w2"), merge=False, dtype=F32, state=1, batch=1, channels=24)


@pytest.mark.parametrize("state", [1, 2])
def test_split_paths(splits, state):
    splits(1)
    check_cross((5, 9), ("v", "h_flip"), dtype=F32, state=state, batch=1, channels=24)


@pytest.mark.parametrize(
    ("options", "softplus"),
    [
        ({"dtype": F32, "state": 3, "groups": 1}, True),
        ({"dtype": BF16, "state": 1, "groups": 2, "z": False}, True),
        ({"dtype": F16, "state": 2, "D": False, "delta_bias": False, "step_range": (1e-3, 0.1)}, True),
        ({"dtype": F32, "state": 2, "z": False}, True),
    ],
    ids=str,
)
def test_sequence(options, softplus):
    inputs = selective_scan_inputs(batch=1, dim=24, length=21, device=DEVICE, **options)
    check(
        lambda **tensors: selective_scan(**tensors, delta_softplus=softplus, backend="triton"),
        lambda **tensors: selective_scan_ref(**tensors, delta_softplus=softplus),
        inputs,
    )


def test_sequence_split(splits):
    splits(1)
    inputs = selective_scan_inputs(batch=1, dim=24, length=40, state=2, device=DEVICE, dtype=F32)
    check(
        lambda **tensors: selective_scan(**tensors, delta_softplus=True, backend="triton"),
        lambda **tensors: selective_scan_ref(**tensors, delta_softplus=True),
        inputs,
    )


def test_last_state():
    inputs = selective_scan_inputs(batch=2, dim=4, length=21, state=3, device=DEVICE, dtype=F32)
    _, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="triton")
    _, expected = selective_scan_ref(**to_float64(inputs), delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-6)


def test_packed_projection_with_strides():
    """x is a slice of a wider map, the projection of a wider one: no copy, same result."""
    inputs = pack(cross_selective_scan_inputs(1, (3, 4), 4, 1, CROSS, 2, device=DEVICE, dtype=F32))
    options = {"paths": CROSS, "backend": "triton"}
    expected = cross_selective_scan_packed(**inputs, **options)
    for name in ("x", "x_dbl"):
        inputs[name] = torch.cat([inputs[name], inputs[name]], dim=-1)[..., : inputs[name].shape[-1]]
        assert not inputs[name].is_contiguous()
    assert torch.equal(cross_selective_scan_packed(**inputs, **options), expected)


def test_maps_without_a_common_position_stride():
    """A cropped map has no single stride from position to position."""
    inputs = pack(cross_selective_scan_inputs(1, (5, 6), 4, 1, ("v",), 2, device=DEVICE, dtype=F32))
    cropped = {name: m[:, :3, :4] if name in ("x", "x_dbl") else m for name, m in inputs.items()}
    copied = {name: None if m is None else m.contiguous() for name, m in cropped.items()}
    options = {"paths": ("v",), "backend": "triton"}
    assert torch.equal(cross_selective_scan_packed(**cropped, **options), cross_selective_scan_packed(**copied, **options))


def test_float16_parts_do_not_overflow():
    """Two paths whose outputs leave float16's range one by one and cancel in the sum."""
    inputs = cross_selective_scan_inputs(1, (1, 3), 2, 1, ("h", "h_flip"), 1, device=DEVICE, dtype=F16)
    inputs["D"] = torch.tensor([[6e4, 6e4], [-6e4, -6e4]], device=DEVICE)
    inputs["x"] = torch.full_like(inputs["x"], 4.0)
    y = cross_selective_scan(**inputs, paths=("h", "h_flip"), backend="triton")
    expected = cross_selective_scan_ref(**to_float64(inputs), paths=ScanPaths(("h", "h_flip"), (1, 3)))
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0.05)  # float32 cancellation at 2.4e5


def test_bitwise_repeatable():
    paths = ("v", "h_flip")
    inputs = pack(cross_selective_scan_inputs(1, (4, 5), 4, 1, paths, 2, device=DEVICE, dtype=BF16))

    def run():
        return outputs_and_gradients(cross_selective_scan_packed, inputs, paths=paths, backend="triton")

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_path_that_begins_beyond_32_bits():
    """x per path, 2^30 elements apart: virtual memory alone, of which a few pages are touched."""
    paths, apart = ("h", "v", "h_flip"), 2**30
    inputs = cross_selective_scan_inputs(1, (2, 3), 8, 1, paths, 2, shared=False, dtype=F16, device=DEVICE)
    expected = outputs_and_gradients(lambda **t: cross_selective_scan(**t, paths=paths, backend="triton"), inputs)
    spread = torch.empty(2 * apart + 48, dtype=F16, device=DEVICE).as_strided((1, 3, 2, 3, 8), (3 * apart, apart, 24, 8, 1))
    inputs["x"] = spread.copy_(inputs["x"])
    actual = outputs_and_gradients(lambda **t: cross_selective_scan(**t, paths=paths, backend="triton"), inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's, of such steps
@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize("state", [1, 2])
def test_steps_after_the_end_of_a_path_overflow_nothing(length, state, splits):
    """There only the bias is left of the step: exp(bias A) is infinite, and every gradient finite all the same."""
    inputs = selective_scan_inputs(1, 2, length, state, softplus=False, dtype=F32, device=DEVICE)
    inputs["delta_bias"].fill_(-100)
    inputs["delta"] = 100.5 + torch.rand_like(inputs["delta"])
    inputs["A"] = -0.5 - torch.rand_like(inputs["A"])
    expected = outputs_and_gradients(selective_scan_ref, to_float64(inputs))
    for count in (1, 2):
        splits(count)
        actual = outputs_and_gradients(lambda **t: selective_scan(**t, backend="triton"), inputs)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-5 * value.abs().max().item())


def refused_by_name_alone(function, inputs, reason, **options):
    """Triton asked for by name raises; with no backend asked for, another computes, of which a GPU's user hears."""
    with pytest.raises(RuntimeError, match=reason):
        function(**inputs, **options, backend="triton")
    backends._warn_slow.cache_clear()
    with contextlib.nullcontext() if INTERPRETED else pytest.warns(RuntimeWarning, match=reason):
        actual = function(**inputs, **options)
    torch.testing.assert_close(actual, function(**inputs, **options, backend="reference"))


def test_too_many_states():
    reason = "A has 65 state variables.*up to 64"
    inputs = cross_selective_scan_inputs(1, (1, 2), 2, 65, ("h",), 1, device=DEVICE, dtype=F32)
    refused_by_name_alone(cross_selective_scan, inputs, reason, paths=("h",))
    refused_by_name_alone(cross_selective_scan_packed, pack(inputs), reason, paths=("h",))
    refused_by_name_alone(selective_scan, selective_scan_inputs(1, 2, 3, 65, device=DEVICE, dtype=F32), reason, delta_softplus=True)


@pytest.mark.parametrize("name", ["A", "D", "delta_bias"])
def test_a_float64_parameter(name):
    """The last state is then float64, which Triton's is not."""
    inputs = selective_scan_inputs(1, 2, 3, 2, device=DEVICE, dtype=F32)
    inputs[name] = inputs[name].double()
    refused_by_name_alone(selective_scan, inputs, rf"{name} is torch\.float64", delta_softplus=True, return_last_state=True)


def leaves_of(inputs):
    return {name: t.requires_grad_() for name, t in inputs.items()}


def opcheck_backward(operator, arguments, *rest):
    """Of the operator's gradient: among others, that its outputs have no storage in common."""
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    y, _, states = operator(*arguments, False, *rest)
    backend = rest if rest == ("triton",) else ()
    backward = getattr(torch.ops.visionssm, f"{operator.__name__}_backward").default
    torch.library.opcheck(
        backward, (torch.randn_like(y), states, *arguments, *backend), test_utils=("test_schema", "test_faketensor")
    )


def test_opcheck_of_the_map():
    paths = ["v", "h_flip"]
    t = leaves_of(pack(cross_selective_scan_inputs(1, (2, 2), 4, 2, tuple(paths), 2, device=DEVICE, dtype=F32)))
    x = t["x"].detach().unsqueeze(1).requires_grad_()
    arguments = (x, t["x_dbl"], t["A"], t["D"], t["dt_weight"], t["dt_bias"], paths, True, True, True, "triton")
    torch.library.opcheck(torch.ops.visionssm.cross_selective_scan.default, arguments)
    opcheck_backward(torch.ops.visionssm.cross_selective_scan, arguments[:9], "triton")
    wide = tuple(m.detach().double().requires_grad_() for m in arguments[2:6])  # the states stay float32
    torch.library.opcheck(torch.ops.visionssm.cross_selective_scan.default, (*arguments[:2], *wide, *arguments[6:]))


def test_opcheck_of_the_sequence():
    t = leaves_of(selective_scan_inputs(1, 4, 5, 2, 2, device=DEVICE, dtype=F32))
    arguments = tuple(t[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    torch.library.opcheck(torch.ops.visionssm.selective_scan.default, (*arguments, True, True, True))
    opcheck_backward(torch.ops.visionssm.selective_scan, (*arguments, True), True)  # keep_states


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice; the results are held to float32
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_forward_and_backward(dynamic):
    t = leaves_of(pack(cross_selective_scan_inputs(1, (2, 3), 4, 1, ("v", "h_flip"), 2, device=DEVICE, dtype=F32)))

    def run(x, x_dbl, A, D, dt_weight, dt_bias):
        options = {"paths": ("v", "h_flip"), "dt_weight": dt_weight, "dt_bias": dt_bias, "backend": "triton"}
        return cross_selective_scan_packed(x, x_dbl, A, D, **options) * 2

    def outcome(f):
        y = f(**t)
        return y, *torch.autograd.grad(y.square().sum(), tuple(t.values()))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor")
    for actual, expected in zip(outcome(compiled), outcome(run), strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_second_derivative():
    t = leaves_of(selective_scan_inputs(1, 2, 3, 1, device=DEVICE, dtype=F32))
    y = selective_scan(**t, delta_softplus=True, backend="triton")
    (du,) = torch.autograd.grad(y.sum(), t["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative of selective_scan on this backend"):
        du.sum().backward()


def test_gradient_through_vmap():
    """Under vmap no operand says that it requires a gradient."""
    inputs = selective_scan_inputs(1, 4, 5, 2, dtype=F32, device=DEVICE)
    u = torch.stack([inputs.pop("u"), inputs["z"]]).requires_grad_()

    def scan(u):
        return selective_scan(u, **inputs, delta_softplus=True, backend="triton")

    both = torch.vmap(scan)(u), torch.stack([scan(v) for v in u])
    actual, expected = (torch.autograd.grad(y.square().sum(), u)[0] for y in both)
    torch.testing.assert_close(actual, expected)


def test_results_lie_as_the_operator_promises():
    """Sequence-first tensors: what comes back is channels-last all the same, which compiled code relies on."""
    inputs = selective_scan_inputs(2, 8, 5, 2, dtype=F32, device=DEVICE)
    for name in ("u", "delta", "z"):
        inputs[name] = inputs[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = selective_scan(**leaves, delta_softplus=True, backend="triton")
    operator = torch.ops.visionssm.selective_scan_backward.default
    strides = []
    with torch.no_grad():
        states = y.grad_fn.saved_tensors[-1]
        arguments = [inputs[name].detach() for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        arguments[3:5] = [m if m.dim() == 4 else m.unsqueeze(1) for m in arguments[3:5]]
        strides = [g.stride() for g in operator(torch.ones_like(y), states, *arguments, True)]
    channels_last = (40, 1, 8)
    assert y.stride() == channels_last
    assert [strides[i] for i in (0, 1, 6)] == 3 * [channels_last]
