"""The operators reproduce what the published implementations computed, values and gradients: float64 to 1e-9, float32 to 1e-5."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_golden import BLOCK, Golden, compare, digest

from visionssm.ops import BIDIRECTIONAL, CROSS, ScanPaths, cross_merge, cross_scan, cross_selective_scan, selective_scan

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SELECTIVE_SCAN, VIM, MAPS, PATHS = Golden("selective_scan"), Golden("vim"), Golden("cross"), Golden("paths")


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def leaves(arrays, dtype):
    return {name: torch.from_numpy(array).to(dtype).requires_grad_() for name, array in arrays.items()}


def numpy(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", SELECTIVE_SCAN.cases, ids=lambda case: case["name"])
def test_selective_scan(case, dtype, backend):
    inputs = leaves(SELECTIVE_SCAN.inputs(case["name"]), dtype)
    w = inputs.pop("w").detach()
    options = {"delta_softplus": case["delta_softplus"], "return_last_state": True, "backend": backend}
    y, last_state = selective_scan(**inputs, **options)
    y.backward(w)
    actual = {"y": y, "last_state": last_state} | {f"d{name}": t.grad for name, t in inputs.items()}
    SELECTIVE_SCAN.compare(case["name"], numpy(actual), TOLERANCE[dtype])


@pytest.mark.parametrize("case", [case for case in VIM.cases if case.startswith("scan")])
def test_vim_scan(case, dtype, backend):
    inputs = leaves(VIM.inputs(case), dtype)
    w = inputs.pop("w").detach()
    softplus = case != "scan_plain"
    out, last_state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend=backend)
    out.backward(w)
    actual = {"out": out, "last_state": last_state} | {f"grad.{name}": t.grad for name, t in inputs.items()}
    VIM.compare(case, numpy(actual), TOLERANCE[dtype])


def test_vim_hidden_attention(backend):
    """The scan is a causal matrix per channel, y = alpha u, and the gated scan is (silu(z)) (alpha + D I) u.

    Column j of the matrix is the scan's response to an impulse at step j, with delta, B and C held.
    """
    inputs = leaves(VIM.inputs("attention_L20"), torch.float64)
    w = inputs.pop("w").detach()
    out, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    out.backward(w)
    held = {name: t.detach() for name, t in inputs.items() if name != "u"}
    plain = {name: t for name, t in held.items() if name not in ("D", "z")}
    impulses = torch.eye(20, dtype=torch.float64)[:, None, None].expand(20, *inputs["u"].shape[:2], 20)

    def matrix(arguments):
        columns = [selective_scan(u, **arguments, delta_softplus=True, backend=backend) for u in impulses]
        return torch.stack(columns, dim=-1)  # (batch, dim, read at, written at)

    actual = {"out": out, "last_state": last_state, "alpha": matrix(plain), "alpha_gated_with_D": matrix(held)}
    actual |= {f"grad.{name}": t.grad for name, t in inputs.items()}
    VIM.compare("attention_L20", numpy(actual), 1e-9)


def causal_conv(u, weight, bias, dim):
    """silu(causal depthwise conv) over the last axis of (batch, dim, length)."""
    return F.silu(F.conv1d(F.pad(u, (weight.shape[-1] - 1, 0)), weight, bias, groups=dim))


@pytest.mark.parametrize("case", [case for case in VIM.cases if case.startswith("conv")])
def test_vim_conv(case, dtype):
    inputs = leaves(VIM.inputs(case), dtype)
    w = inputs.pop("w").detach()
    out = causal_conv(*inputs.values(), dim=6)
    out.backward(w)
    VIM.compare(case, numpy({"out": out} | {f"grad.{name}": t.grad for name, t in inputs.items()}), TOLERANCE[dtype])


def vim_mixer(x, weights, scan):
    """Vim's bidirectional mixer (arXiv 2401.09417, algorithm 1) on (batch, length, dim); `scan` combines the two branches."""
    inner = weights["D"].shape[0]
    u, z = (x @ weights["in_proj.weight"].T).mT.split(inner, dim=1)  # (batch, inner, length)
    return (scan(u, z) / 2).mT @ weights["out_proj.weight"].T


def branch(weights, u, suffix):
    """conv and projections of one direction -> u, dt, B, C, each (batch, ., length)."""
    state = weights["A_log"].shape[1]
    u = causal_conv(u, weights[f"conv1d{suffix}.weight"], weights[f"conv1d{suffix}.bias"], u.shape[1])
    rank = weights["dt_proj.weight"].shape[1]
    return u, *(weights[f"x_proj{suffix}.weight"] @ u).split([rank, state, state], dim=1)


@pytest.mark.parametrize("form", ["selective_scan", "image", "scan"])
@pytest.mark.parametrize("case", [case for case in VIM.cases if case.startswith("mixer")])
def test_vim_mixer(case, form, dtype, backend):
    """One mixer through three of the operator's forms: two 1-D scans, K = 2 paths in image order, and in scan order."""
    weights = leaves(VIM.inputs(case), dtype)
    w, x = weights.pop("w").detach(), weights["x"]
    twins = [(weights[f"{name}_log"], weights[d], s) for name, d, s in (("A", "D", ""), ("A_b", "D_b", "_b"))]

    def two_scans(u, z):
        ys = []
        for k, (A_log, D, suffix) in enumerate(twins):
            flip = (lambda t: t.flip(-1)) if k else (lambda t: t)
            v, dt, B, C = branch(weights, flip(u), suffix)
            delta, bias = weights[f"dt_proj{suffix}.weight"] @ dt, weights[f"dt_proj{suffix}.bias"]
            ys.append(flip(selective_scan(v, delta, -A_log.exp(), B, C, D, flip(z), bias, True, backend=backend)))
        return ys[0] + ys[1]

    def two_paths(u, z):
        """Both convolutions in image order, the backward one anti-causal; the gate after the merge."""
        branches = [branch(weights, u, ""), tuple(t.flip(-1) for t in branch(weights, u.flip(-1), "_b"))]
        v, dt, B, C = (torch.stack(ts, dim=1).mT.unsqueeze(2) for ts in zip(*branches, strict=True))  # (batch, 2, 1, L, .)
        parameters = {
            "A": torch.stack([-A_log.exp() for A_log, _, _ in twins]),
            "D": torch.stack([D for _, D, _ in twins]),
            "dt_weight": torch.stack([weights[f"dt_proj{s}.weight"] for _, _, s in twins]),
            "dt_bias": torch.stack([weights[f"dt_proj{s}.bias"] for _, _, s in twins]),
        }
        if form == "image":
            y = cross_selective_scan(v, dt, B=B, C=C, **parameters, paths=BIDIRECTIONAL, backend=backend)
        else:
            v, dt, B, C = (torch.stack([t[:, 0, 0], t[:, 1, 0].flip(1)], dim=1) for t in (v, dt, B, C))
            ys = cross_selective_scan(v, dt, B=B, C=C, **parameters, paths=BIDIRECTIONAL, order="scan", backend=backend)
            y = cross_merge(ys, BIDIRECTIONAL, (1, u.shape[-1]))
        return y.squeeze(1).mT * F.silu(z)

    out = vim_mixer(x, weights, two_scans if form == "selective_scan" else two_paths)
    out.backward(w)
    VIM.compare(case, numpy({"out": out} | {f"grad.{name}": t.grad for name, t in weights.items()}), TOLERANCE[dtype])


@pytest.mark.parametrize("case", MAPS.cases, ids=lambda case: case["tag"])
def test_cross_scan_and_merge(case):
    """Four-way cross-scan and cross-merge with gradients. Channel-first data and stacked maps are moved to our layout."""
    inputs = leaves(MAPS.inputs(case["tag"]), torch.float32)
    size = (case["H"], case["W"])
    map_first, sequence_first = case["in_channel_first"], case["out_channel_first"]

    def to_sequences(t, channel_first):
        """(batch, K, C, positions...) or (batch, positions..., K, C) -> (batch, K, positions, C)."""
        return t.flatten(3).mT if channel_first else t.flatten(1, -3).transpose(1, 2)

    def from_sequences(t, channel_first):
        return t.mT if channel_first else t.transpose(1, 2)

    def from_maps(t, channel_first):
        """(batch, H, W, C) or (batch, K, H, W, C) -> the record's layout with H and W flat."""
        t = t.flatten(-3, -2)
        return from_sequences(t, channel_first) if t.dim() == 4 else (t.mT if channel_first else t)

    def scan(x):
        if case["one_by_one"]:
            maps = to_sequences(x, map_first).unflatten(2, size)
            return torch.cat([cross_scan(maps[:, k], (name,)) for k, name in enumerate(CROSS)], dim=1)
        return cross_scan(x.movedim(1, -1) if map_first else x, CROSS)

    scan_y = from_sequences(scan(inputs["scan_x"]), sequence_first)
    scan_y.backward(inputs["scan_w"].detach().reshape(scan_y.shape))
    ys = to_sequences(inputs["merge_ys"], sequence_first)
    merge_out = from_maps(cross_merge(ys, CROSS, size, merge=not case["one_by_one"]), map_first)
    merge_out.backward(inputs["merge_w"].detach().reshape(merge_out.shape))
    actual = {"scan_y": scan_y, "scan_dx": inputs["scan_x"].grad, "merge_out": merge_out, "merge_dys": inputs["merge_ys"].grad}
    MAPS.compare(case["tag"], numpy(actual), 1e-6)


def test_path_tables():
    """All patterns of LocalMamba at 17 grid sizes, with the true inverse on non-square grids."""
    tables = PATHS.arrays["tables"].astype(np.int64)
    assert len(PATHS.cases) == 136
    for name, height, width, steps in PATHS.cases:
        forth, back, tables = np.split(tables, [steps, steps + height * width])
        paths = ScanPaths((name,), (height, width))
        np.testing.assert_array_equal(paths.table[0], forth, f"{name} {height}x{width}")
        np.testing.assert_array_equal(paths.inverse[0], back, f"{name} {height}x{width}, inverse")
        raster = torch.arange(1.0, height * width + 1).reshape(1, height, width, 1)
        sequence = cross_scan(raster, (name,))
        np.testing.assert_array_equal(sequence.flatten().numpy() - 1, forth)
        np.testing.assert_array_equal(cross_merge(sequence, (name,), (height, width)).numpy(), raster.numpy())
    assert not tables.size


def test_digest_sees_every_element():
    """What the comparisons above rest on: one element off by just more than the tolerance is found, wherever it is."""
    array = np.random.default_rng(0).standard_normal(500)
    expected = digest(array)
    compare("exact", array, expected, 1e-9)
    for element in range(array.size):
        wrong = array.copy()
        wrong[element] += 1.001e-9 * np.abs(array).max()
        with pytest.raises(AssertionError, match=f"elements {element // BLOCK * BLOCK} to"):
            compare("wrong", wrong, expected, 1e-9)
