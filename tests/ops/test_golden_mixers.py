"""Whole mixers on the operators reproduce the published ones to 1e-5: VMamba's SS2D with gradients, LocalMamba's two mixers."""

import pytest
import torch
import torch.nn.functional as F
from fill import fill
from ops_golden import Golden
from timm.models.swin_transformer import PatchMerging

from visionssm.layers.ss2d import SS2D
from visionssm.ops import ScanPaths, cross_merge, cross_scan, cross_selective_scan, cross_selective_scan_packed

SS2D_CASES, LOCAL = Golden("ss2d"), Golden("local")
LOCAL_CASES = {case["name"]: case for case in LOCAL.cases}


def filled(case, dtype=torch.float64):
    return {name: torch.from_numpy(fill(name, shape)).to(dtype) for name, shape in case["state_dict"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", SS2D_CASES.cases, ids=lambda case: case["tag"])
def test_ss2d(case, dtype):
    """The layer against VMamba's, gated and not, with and without convolution bias, N = 1 and 16, in both layouts."""
    weights = filled(case, dtype)
    inner = weights["out_norm.weight"].numel()
    mixer = SS2D(
        24,
        d_state=weights["A_logs"].shape[1],
        ssm_ratio=inner / 24,
        gate=weights["in_proj.weight"].shape[0] == 2 * inner,
        conv_bias="conv2d.bias" in weights,
        dtype=dtype,
    )
    mixer.load_state_dict({name: t.reshape(mixer.get_parameter(name).shape) for name, t in weights.items()})
    data = {name: torch.from_numpy(array).to(dtype) for name, array in SS2D_CASES.inputs(case["tag"]).items()}
    x = data["x"].requires_grad_()
    y = mixer(x.movedim(1, -1)).movedim(-1, 1) if case["channel_first"] else mixer(x)
    y.backward(data["w"])
    actual = {"y": y.detach(), "dx": x.grad} | {f"d:{name}": p.grad for name, p in mixer.named_parameters()}
    SS2D_CASES.compare(case["tag"], {name: t.numpy() for name, t in actual.items()}, 1e-5)


def channel_gate(y, weights, prefix="attn."):
    """LocalMamba's BiAttn on (..., length, inner): scale the channels by a gate computed from the mean of the normed sequence."""
    w = {name.removeprefix(prefix): t for name, t in weights.items()}
    g = F.layer_norm(y, y.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-5).mean(-2, keepdim=True)
    g = F.gelu(F.linear(g, w["global_reduce.weight"], w["global_reduce.bias"]))
    return y * torch.sigmoid(F.linear(g, w["channel_select.weight"], w["channel_select.bias"]))


def sum_paths(ys, weights):
    """(batch, K, length, inner) -> (batch, length, inner); the super-net norms the paths and weighs them by a softmax."""
    if "multi_scan.weights" not in weights:
        return ys.sum(1)
    share = torch.softmax(weights["multi_scan.weights"].flatten(), 0)[:, None, None]
    return (share * F.layer_norm(ys, ys.shape[-1:], eps=1e-5)).sum(1)


def stacked(weights, name, count):
    return torch.stack([weights[name.format(k)] for k in range(count)])


def local_vim_mixer(x, weights, paths, backend):
    """LocalVim's mixer on (batch, tokens, dim): convolution, projections and gate per path, in scan order."""
    k, state = len(paths), weights["A_log_0"].shape[1]
    u, z = cross_scan(F.linear(x, weights["in_proj.weight"]), paths).chunk(2, dim=-1)  # (batch, K, L', inner)
    inner, rank = u.shape[-1], weights["dt_proj_0.weight"].shape[1]
    conv_weight = stacked(weights, "conv1d_{}.weight", k).flatten(0, 1)  # (K * inner, 1, 4)
    conv_bias = stacked(weights, "conv1d_{}.bias", k).flatten()
    u = F.conv1d(F.pad(u.mT.flatten(1, 2), (3, 0)), conv_weight, conv_bias, groups=k * inner)
    u = F.silu(u).unflatten(1, (k, inner)).mT
    projected = torch.einsum("bklc,kmc->bklm", u, stacked(weights, "x_proj_{}.weight", k))
    dt, B, C = projected.split([rank, state, state], dim=-1)
    ys = cross_selective_scan(
        u,
        dt,
        -stacked(weights, "A_log_{}", k).exp(),
        B,
        C,
        stacked(weights, "D_{}", k),
        dt_weight=stacked(weights, "dt_proj_{}.weight", k),
        dt_bias=stacked(weights, "dt_proj_{}.bias", k),
        paths=paths,
        order="scan",
        backend=backend,
    )
    ys = cross_merge(ys * F.silu(z), paths, merge=False)
    ys = ys if paths.token_at is not None else ys.flatten(2, 3)
    return F.linear(sum_paths(channel_gate(ys, weights), weights), weights["out_proj.weight"])


def local_ss2d(x, weights, paths, backend):
    """LocalVMamba's mixer on (batch, H, W, dim): one convolution and gate, the paths apart until the channel gate."""
    k, inner, rank = weights["dt_projs_weight"].shape
    u, z = F.linear(x, weights["in_proj.weight"]).chunk(2, dim=-1)
    u = F.silu(F.conv2d(u.movedim(-1, 1), weights["conv2d.weight"], weights["conv2d.bias"], padding=1, groups=inner)).movedim(1, -1)
    assert rank + 2 * weights["A_logs"].shape[1] == weights["x_proj_weight"].shape[1]
    ys = cross_selective_scan_packed(
        u,
        torch.einsum("bhwc,kmc->bhwkm", u, weights["x_proj_weight"]),
        -weights["A_logs"].exp().unflatten(0, (k, inner)),
        weights["Ds"].unflatten(0, (k, inner)),
        dt_weight=weights["dt_projs_weight"],
        dt_bias=weights["dt_projs_bias"],
        paths=paths,
        merge=False,
        backend=backend,
    )
    y = sum_paths(channel_gate(ys.flatten(2, 3), weights, "multi_scan.attn."), weights).reshape(u.shape)
    y = F.layer_norm(y, (inner,), weights["out_norm.weight"], weights["out_norm.bias"], 1e-5)
    return F.linear(y * F.silu(z), weights["out_proj.weight"])


@pytest.mark.parametrize("name", [name for name, case in LOCAL_CASES.items() if "directions" in case])
def test_local_mixer(name, backend):
    """Both mixers over windows that pad, odd and non-square grids, class tokens, and the super-nets' eight paths."""
    case = LOCAL_CASES[name]
    x = torch.from_numpy(LOCAL.inputs(name)["in"]).double()
    grid = tuple(case["grid"])
    token_at = grid[0] * grid[1] // 2 if "_cls_" in name else None
    paths = ScanPaths(tuple(case["directions"]), grid, token_at)
    mixer = local_ss2d if "ss2d" in name else local_vim_mixer
    LOCAL.compare(name, {"out": mixer(x, filled(case), paths, backend).numpy()}, 1e-5)


def test_local_channel_gate():
    x = torch.from_numpy(LOCAL.inputs("biattn")["in"]).double()
    LOCAL.compare("biattn", {"out": channel_gate(x, filled(LOCAL_CASES["biattn"]), prefix="").numpy()}, 1e-5)


def test_local_patch_merging():
    """timm's 2 x 2 merging, which our hierarchical models use, on a map with odd height."""
    layer = PatchMerging(16, 32, dtype=torch.float64)
    layer.load_state_dict(filled(LOCAL_CASES["patch_merging_5x6"]))
    with torch.no_grad():
        out = layer(torch.from_numpy(LOCAL.inputs("patch_merging_5x6")["in"]).double())
    LOCAL.compare("patch_merging_5x6", {"out": out.numpy()}, 1e-5)
