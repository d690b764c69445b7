"""The chunked backend against the reference: every cut of a path into chunks, groups, dtypes, memory, threads, modes."""

import threading

import pytest
import torch
from torch.autograd import gradcheck

from visionssm.ops import BIDIRECTIONAL, CROSS, chunked, cross_selective_scan, cross_selective_scan_packed, selective_scan
from visionssm.ops.testing import (
    assert_within_budget,
    cross_selective_scan_inputs,
    error_budget,
    outputs_and_gradients,
    pack,
    selective_scan_inputs,
    to_float64,
)

WINDOWS = ("w2", "w7_flip", "w3", "w2_flip", "w1")
PATH_SETS = [CROSS, BIDIRECTIONAL, WINDOWS, ("v", "h", "v", "v_flip", "h_flip", "w2")]
MAPS = [(1, 1), (1, 9), (9, 1), (5, 7), (13, 6)]
LONG_MAPS = [(1, 197), (211, 1), (2, 67), (67, 2), (23, 29)]  # primes, and sides too long for a chunk
OPTIONS = [
    {"state": 1, "rank": 3},
    {"state": 16, "rank": None, "D": False, "shared": False, "merge": False},
    {"state": 2, "rank": 2, "dt_bias": False, "shared": False},
    {"state": 3, "rank": None, "dt_bias": False, "softplus": False, "merge": False},
    {"state": 1, "rank": 1, "D": False, "softplus": False},
]


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def compare(inputs, op=cross_selective_scan_packed, **options):
    """Output and every gradient of the chunked backend, in float64 and float32, against the reference in float64."""
    single = {name: None if t is None else t.float() for name, t in inputs.items()}
    expected = outputs_and_gradients(op, to_float64(single), backend="reference", **options)
    for inputs, tolerance in ((to_float64(single), 1e-9), (single, 1e-5)):
        actual = outputs_and_gradients(op, inputs, backend="chunked", **options)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(actual[name], value) <= tolerance, name


def options_of(case):
    case = dict(case)
    merge, softplus = case.pop("merge", True), case.get("softplus", True)
    return case, {"merge": merge, "dt_softplus": softplus}


@pytest.fixture
def small_groups(monkeypatch):
    """Every sample and state in a group of its own."""
    monkeypatch.setattr(chunked, "_GROUP", 16)


# --- values and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()))
@pytest.mark.parametrize("paths", PATH_SETS, ids=lambda paths: "-".join(paths))
def test_equals_the_reference(paths, case):
    case, options = options_of(case)
    for size in MAPS:
        compare(pack(cross_selective_scan_inputs(batch=3, size=size, paths=paths, **case)), paths=paths, **options)


@pytest.mark.parametrize("size", LONG_MAPS, ids=str)
def test_long_paths(size):
    paths = ("h", "v_flip", "w3")
    compare(pack(cross_selective_scan_inputs(size=size, paths=paths)), paths=paths)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("case", OPTIONS[:4], ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()))
def test_groups_of_samples_and_states(case):
    case, options = options_of(case)
    paths = ("h", "v_flip", "w2_flip")
    compare(pack(cross_selective_scan_inputs(batch=3, size=(5, 7), paths=paths, **case)), paths=paths, **options)


@pytest.mark.parametrize(
    ("size", "state"), [((1, 1), 1), ((1, 1), 16), ((1, 5), 1), ((5, 1), 2), ((3, 4), 1), ((2, 3), 16)], ids=str
)
def test_gradcheck(size, state):
    inputs = pack(cross_selective_scan_inputs(batch=1, size=size, channels=2, state=state, paths=("h", "v_flip", "w2"), rank=1))
    tensors = [t.requires_grad_() for t in inputs.values()]

    def function(*tensors):
        inputs_ = dict(zip(inputs, tensors, strict=True))
        return cross_selective_scan_packed(**inputs_, paths=("h", "v_flip", "w2"), backend="chunked")

    assert gradcheck(function, tensors)


@pytest.mark.parametrize("size", [(5, 7), (13, 6)], ids=str)
@pytest.mark.parametrize("state", [1, 16])
def test_gradcheck_odd_maps(size, state):
    inputs = cross_selective_scan_inputs(batch=2, size=size, channels=3, state=state, rank=None, shared=False)
    tensors = [t.requires_grad_() for t in inputs.values() if t is not None]

    def function(x, dt, A, B, C, D, dt_bias):
        return cross_selective_scan(x, dt, A, B, C, D, paths=CROSS, dt_bias=dt_bias, merge=False, backend="chunked")

    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("length", [1, 16, 17, 200, 211])
def test_selective_scan_and_its_last_state(length):
    inputs = selective_scan_inputs(batch=2, dim=4, length=length, state=3, groups=2)
    y, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="chunked")
    y_ref, last_state_ref = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="reference")
    assert relative_error(y, y_ref) <= 1e-9
    assert relative_error(last_state, last_state_ref) <= 1e-9
    compare(inputs, op=selective_scan, delta_softplus=True)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [1, 16])
def test_16_bit_within_the_error_budget(dtype, state):
    inputs = pack(cross_selective_scan_inputs(size=(9, 8), channels=8, state=state, dtype=dtype))
    runs = [(inputs, "chunked"), (inputs, "reference"), (to_float64(inputs), "reference")]
    results = [outputs_and_gradients(cross_selective_scan_packed, *run[:1], paths=CROSS, backend=run[1]) for run in runs]
    for name in results[0]:
        assert_within_budget(*(result[name] for result in results), name=name)


def test_fp16_does_not_overflow_inside():
    """The state may pass 65504, the largest fp16, as long as the output does not."""
    inputs = pack(cross_selective_scan_inputs(size=(8, 8), state=1, dtype=torch.float16))
    inputs["x"] = inputs["x"] * 200
    B, C = (inputs["x_dbl"][..., -2:-1], inputs["x_dbl"][..., -1:])
    B.mul_(1000)
    C.mul_(1e-4)
    y = cross_selective_scan_packed(**inputs, paths=CROSS, backend="chunked")
    expected = cross_selective_scan_packed(**to_float64(inputs), paths=CROSS, backend="reference")
    assert relative_error(y, expected) <= 2e-3


@pytest.mark.parametrize("bias", [-300.0, -60.0, 0.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 80.0])
def test_steps_far_from_one(bias, spread):
    """Where softplus is linear, where it vanishes, and where decays underflow."""
    inputs = pack(cross_selective_scan_inputs(size=(6, 5), channels=4, state=2, dtype=torch.float32))
    inputs["dt_bias"] = inputs["dt_bias"] * 0 + bias
    inputs["x_dbl"][..., :2] *= spread
    expected = outputs_and_gradients(cross_selective_scan_packed, to_float64(inputs), paths=CROSS, backend="reference")
    actual = outputs_and_gradients(cross_selective_scan_packed, inputs, paths=CROSS, backend="chunked")
    plain = outputs_and_gradients(cross_selective_scan_packed, inputs, paths=CROSS, backend="reference")
    for name, value in expected.items():
        error = (actual[name].double() - value).abs().max().item()
        assert error <= error_budget(plain[name], value) + 1e-25, name  # a decay of less than exp(-80) counts as exp(-80)


# --- strides, modes, threads ------------------------------------------------------------------------------------------


def test_strided_inputs_and_gradients():
    """Channels-first memory, a slice of a wider projection, a transposed map, a broadcast gradient."""
    plain = pack(cross_selective_scan_inputs(size=(4, 6)))
    strided = plain | {
        "x": plain["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "x_dbl": torch.cat([plain["x_dbl"], plain["x_dbl"]], dim=-1)[..., : plain["x_dbl"].shape[-1]],
        "A": plain["A"].mT.contiguous().mT,
    }
    transposed = plain | {"x": plain["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    for merge in (True, False):
        runs = []
        for inputs in (plain, strided, transposed):
            leaves = [t.detach().requires_grad_() for t in inputs.values()]
            y = cross_selective_scan_packed(*leaves[:2], *leaves[2:4], paths=CROSS, dt_weight=leaves[4], dt_bias=leaves[5],
                                            merge=merge, backend="chunked")  # fmt: skip
            assert y.is_contiguous()
            runs.append((y, *torch.autograd.grad(y.sum(), leaves)))
        for run in runs[1:]:
            for actual, expected in zip(run, runs[0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_then_training():
    """Workspaces made under inference_mode serve a training step, and the other way round, with the same numbers."""
    inputs = pack(cross_selective_scan_inputs(size=(7, 11), channels=5, dtype=torch.float32))  # a size no other test uses
    with torch.inference_mode():
        y = cross_selective_scan_packed(**inputs, paths=CROSS, backend="chunked")
    first = outputs_and_gradients(cross_selective_scan_packed, inputs, paths=CROSS, backend="chunked")
    with torch.inference_mode():
        again = cross_selective_scan_packed(**inputs, paths=CROSS, backend="chunked")
    second = outputs_and_gradients(cross_selective_scan_packed, inputs, paths=CROSS, backend="chunked")
    assert torch.equal(y, first["y"])
    assert torch.equal(y, again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_threads_do_not_share_workspaces():
    cases = [pack(cross_selective_scan_inputs(size=(6, 6), channels=8, dtype=torch.float32, seed=seed)) for seed in range(4)]

    def run(i):
        return outputs_and_gradients(cross_selective_scan_packed, cases[i], paths=CROSS, backend="chunked")

    expected = [run(i) for i in range(4)]
    wrong = []

    def work(i):
        for _ in range(10):
            actual = run(i)
            if not all(torch.equal(actual[name], expected[i][name]) for name in actual):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- time and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 197), (1, 730), (1, 6085), (56, 56), (200, 304)], ids=str)
def test_a_scan_is_few_operations(size):
    """About 7 steps a level and log L levels, whatever the path; not one operation per position."""
    for name in ("h", "v_flip", "w7"):
        layout = chunked._layout(name, *size)
        assert layout.p * layout.q <= 1.1 * layout.length
        work = chunked._Shelf(2 * layout.p * layout.q, torch.empty(0)).workspace(layout, 1, 1, 1, "forward", False)
        assert len(work.forward_steps) <= 150


def saved_bytes(inputs):
    """Bytes that autograd keeps between forward and backward beyond the inputs."""
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept = []

    def pack_hook(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.untyped_storage().nbytes())
        return t

    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        cross_selective_scan_packed(**leaves, paths=CROSS, backend="chunked")
    return sum(kept)


def peak_bytes(function):
    """The most memory `function` holds at once in tensors it makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_nothing_is_kept_between_forward_and_backward():
    assert saved_bytes(pack(cross_selective_scan_inputs(size=(16, 16), channels=8, state=16))) == 0


@pytest.mark.usefixtures("small_groups")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_memory_is_linear_in_length_and_has_no_state_axis():
    def peak(side, state):
        inputs = pack(cross_selective_scan_inputs(batch=1, size=(side, side), channels=64, state=state, paths=("v",)))
        return peak_bytes(lambda: outputs_and_gradients(cross_selective_scan_packed, inputs, paths=("v",), backend="chunked"))

    assert peak(32, 16) <= 4.2 * peak(16, 16)
    states = 8 * 32 * 32 * 64 * 16  # bytes of the states of the path in float64
    assert peak(32, 16) - peak(32, 1) <= states / 4


def test_gate_comes_before_the_rounding():
    """In float16 the scan alone would overflow here; the gate brings it back, as in the reference."""
    u = torch.full((1, 1, 4), 300.0, dtype=torch.float16)
    one, z = torch.ones_like(u), torch.full_like(u, -9.0)
    y, expected = (
        selective_scan(u, one, torch.tensor([[-1e-3]]), u, one, z=z, backend=backend) for backend in ("chunked", "reference")
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected)


def test_gate_of_another_precision():
    u, delta, z = (torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(3))
    A, B, C = -torch.rand(3, 2, dtype=torch.float64), torch.randn(2, 2, 7), torch.randn(2, 2, 7)
    y, expected = (selective_scan(u, delta, A, B, C, z=z.float(), backend=b) for b in ("chunked", "reference"))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
