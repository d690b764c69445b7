"""Derivatives of the public operators against finite differences in float64, in every form; cross_merge as cross_scan's adjoint."""

from inspect import signature

import pytest
import torch
from torch.autograd import grad, gradcheck

from visionssm import ops
from visionssm.ops import (
    BIDIRECTIONAL,
    CROSS,
    ScanPaths,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_selective_scan_packed,
    selective_scan,
)
from visionssm.ops.testing import (
    cross_selective_scan_inputs,
    outputs_and_gradients,
    pack,
    selective_scan_inputs,
)


def check(op, inputs, **options):
    """gradcheck of `op` in all tensors of `inputs`: every derivative, of the slow reference along random directions."""
    names = [name for name, t in inputs.items() if t is not None]

    def function(*tensors):
        return op(**inputs | dict(zip(names, tensors, strict=True)), **options)

    tensors = tuple(inputs[name].requires_grad_() for name in names)
    assert gradcheck(function, tensors, fast_mode=options.get("backend") == "reference")


# --- selective_scan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
@pytest.mark.parametrize("groups", [None, 1, 2, 4], ids=lambda groups: f"groups={groups}")
def test_selective_scan_groups(groups, softplus, backend):
    inputs = selective_scan_inputs(batch=2, dim=4, length=5, state=2, groups=groups, softplus=softplus)
    check(selective_scan, inputs, delta_softplus=softplus, backend=backend)


@pytest.mark.parametrize("present", ["", "D", "z", "delta_bias", "D z"], ids=lambda present: present or "none")
@pytest.mark.parametrize(("length", "state"), [(1, 1), (7, 1), (4, 16)])
def test_selective_scan_optional_inputs(length, state, present, backend):
    switches = {name: name in present.split() for name in ("D", "z", "delta_bias")}
    inputs = selective_scan_inputs(batch=1, dim=2, length=length, state=state, **switches)
    check(selective_scan, inputs, delta_softplus=True, backend=backend)


def test_last_state(backend):
    """It is the recurrence unrolled by hand; asking for it changes nothing else. Only the reference differentiates it."""
    inputs = selective_scan_inputs(dim=4, groups=2)
    y, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    assert torch.equal(y, selective_scan(**inputs, delta_softplus=True, backend=backend))
    delta = torch.nn.functional.softplus(inputs["delta"] + inputs["delta_bias"][:, None])
    later = delta.flip(-1).cumsum(-1).flip(-1) - delta  # what the steps after each one add up to
    decay = torch.exp(later[:, :, None] * inputs["A"][:, :, None])  # (batch, dim, state, length)
    written = (delta * inputs["u"])[:, :, None] * inputs["B"].repeat_interleave(2, dim=1)
    torch.testing.assert_close(last_state, (decay * written).sum(-1))
    if backend == "reference":
        small = selective_scan_inputs(1, 2, 3, 2, D=False, z=False)
        check(lambda **kw: selective_scan(**kw, delta_softplus=True, return_last_state=True, backend=backend)[1], small)


# --- cross_selective_scan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per path"])
@pytest.mark.parametrize("rank", [None, 2], ids=["full dt", "low rank"])
def test_image_order(rank, shared, merge, backend):
    paths = ("v", "w2_flip")
    inputs = cross_selective_scan_inputs(1, (3, 2), 2, 2, paths, rank, shared=shared)
    check(cross_selective_scan, inputs, paths=paths, merge=merge, backend=backend)
    check(cross_selective_scan_packed, pack(inputs), paths=paths, merge=merge, backend=backend)


@pytest.mark.parametrize("present", ["", "D", "dt_bias"], ids=lambda present: present or "none")
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_image_order_optional_inputs(softplus, present, backend):
    switches = {name: name in present.split() for name in ("D", "dt_bias")}
    inputs = cross_selective_scan_inputs(1, (2, 3), 2, 1, CROSS, None, softplus=softplus, **switches)
    check(cross_selective_scan, inputs, paths=CROSS, dt_softplus=softplus, backend=backend)


@pytest.mark.parametrize("rank", [None, 1], ids=["full dt", "low rank"])
def test_scan_order(rank, backend):
    inputs = cross_selective_scan_inputs(2, (1, 5), 2, 2, BIDIRECTIONAL, rank, order="scan")
    check(cross_selective_scan, inputs, paths=BIDIRECTIONAL, order="scan", backend=backend)


@pytest.mark.parametrize(
    ("paths", "state"), [(("v", "w2_flip", "w7"), 1), (("w3_flip", "h_flip", "v_flip"), 16)], ids=["N=1", "N=16"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 7), (13, 6)], ids=lambda size: "x".join(map(str, size)))
def test_odd_maps(size, paths, state):
    """Along random directions on the reference, and the chunked numbers the same."""
    inputs = cross_selective_scan_inputs(1, size, 2, state, paths, 1)
    check(cross_selective_scan, inputs, paths=paths, backend="reference")
    expected = outputs_and_gradients(cross_selective_scan, inputs, paths=paths, backend="reference")
    torch.testing.assert_close(outputs_and_gradients(cross_selective_scan, inputs, paths=paths, backend="chunked"), expected)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4], ids=str)
@pytest.mark.parametrize("rank", [None, 2], ids=["full dt", "low rank"])
def test_extreme_steps(rank, scale):
    """Steps far below, above and beyond what softplus and exp resolve: chunked agrees with the reference, and nothing is NaN."""
    inputs = cross_selective_scan_inputs(2, (4, 5), 3, 2, CROSS, rank)
    inputs["dt"] = inputs["dt"] * scale
    inputs["dt_bias"] = inputs["dt_bias"] - (20.0 if scale < 1 else 0.0)
    expected = outputs_and_gradients(cross_selective_scan, inputs, paths=CROSS, backend="reference")
    actual = outputs_and_gradients(cross_selective_scan, inputs, paths=CROSS, backend="chunked")
    assert all(t.isfinite().all() for t in expected.values())
    torch.testing.assert_close(actual, expected)


def test_half_precision_does_not_overflow(backend):
    """A state beyond the range of float16 whose output is within it: the state must be kept in float32."""
    length = 400
    u = torch.full((1, 1, length), 8.0, dtype=torch.float16)
    ones = torch.ones(1, 1, length, dtype=torch.float16)
    y = selective_scan(u, 32.0 * ones, torch.full((1, 1), -1e-6), ones, 1e-3 * ones, backend=backend)
    assert y.dtype == torch.float16
    assert 8.0 * 32.0 * length > torch.finfo(torch.float16).max
    steps = torch.arange(1, length + 1)
    torch.testing.assert_close(y[0, 0].float(), 1e-3 * 8.0 * 32.0 * steps, rtol=1e-2, atol=0.0)


def test_scan_order_is_image_order_rearranged(backend):
    """The two orders of one scan agree, values and gradients, wherever no window pads."""
    paths = ScanPaths(("h", "v_flip", "w2"), (4, 6))
    inputs = cross_selective_scan_inputs(2, (4, 6), 3, 2, paths.names)

    def rearranged(x, dt, B, C, **parameters):
        maps = {"dt": dt, "B": B, "C": C}
        maps = {n: torch.stack([cross_scan(m[:, k], paths)[:, k] for k in range(3)], dim=1) for n, m in maps.items()}
        ys = cross_selective_scan(cross_scan(x, paths), **maps, **parameters, paths=paths, order="scan", backend=backend)
        return cross_merge(ys, paths)

    actual = outputs_and_gradients(rearranged, inputs)
    torch.testing.assert_close(actual, outputs_and_gradients(cross_selective_scan, inputs, paths=paths, backend=backend))


@pytest.mark.parametrize("name", ["selective_scan", "cross_selective_scan", "cross_scan", "cross_merge"])
def test_reference_twins(name):
    """Each has the arguments of its public form, but for the backend, and takes them as that does."""
    public, twin = getattr(ops, name), getattr(ops, f"{name}_ref")
    arguments = [p.replace(annotation=None) for p in signature(public).parameters.values() if p.name != "backend"]
    assert [p.replace(annotation=None) for p in signature(twin).parameters.values()] == arguments
    inputs, options = {
        "selective_scan": (selective_scan_inputs(), {"delta_softplus": True, "return_last_state": True}),
        "cross_selective_scan": (cross_selective_scan_inputs(), {"paths": CROSS}),
        "cross_scan": ({"x": torch.randn(2, 3, 5, 2)}, {"paths": CROSS}),
        "cross_merge": ({"ys": torch.randn(2, 4, 15, 2)}, {"paths": CROSS, "size": (3, 5)}),
    }[name]
    torch.testing.assert_close(twin(**inputs, **options), public(**inputs, **options))


# --- cross_scan and cross_merge ---------------------------------------------------------------------------------------

NAMES = ("v", "h_flip", "w2_flip", "w3")
PLACES = [(ScanPaths(NAMES, (3, 4)), "map"), (ScanPaths(NAMES, (5, 2)), "flat"), (ScanPaths(NAMES, (3, 4), 6), "flat")]


@pytest.mark.parametrize(("paths", "form"), PLACES, ids=["map", "flat", "token"])
def test_moves(paths, form):
    x = torch.randn(1, *(paths.size if form == "map" else (paths.positions,)), 2, dtype=torch.float64)
    check(cross_scan, {"x": x}, paths=paths)
    ys = torch.randn(1, len(paths), paths.length, 1, dtype=torch.float64)
    for merge in (True, False):
        check(cross_merge, {"ys": ys}, paths=paths, merge=merge)


@pytest.mark.parametrize(("paths", "form"), PLACES, ids=["map", "flat", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_the_adjoint_of_scan(paths, form, dtype):
    """<cross_scan(x), y> = <x, cross_merge(y)>, and each is the other's gradient to the last bit, in every dtype."""
    x = torch.randn(2, *(paths.size if form == "map" else (paths.positions,)), 3, dtype=dtype, requires_grad=True)
    ys = torch.randn(2, len(paths), paths.length, 3, dtype=dtype, requires_grad=True)
    sequences, maps = cross_scan(x, paths), cross_merge(ys, paths)
    assert (sequences.dtype, maps.dtype) == (dtype, dtype)
    torch.testing.assert_close(grad(sequences, x, ys)[0], maps.reshape(x.shape), rtol=0, atol=0)
    torch.testing.assert_close(grad(maps, ys, x.reshape(maps.shape))[0], sequences, rtol=0, atol=0)
    if dtype == torch.float64:
        torch.testing.assert_close((sequences * ys).sum(), (x * maps.reshape(x.shape)).sum())
