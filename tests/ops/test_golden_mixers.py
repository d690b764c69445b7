"""The zoo's mixers, on every backend, reproduce the published ones: Vim's and VMamba's with gradients, LocalMamba's two."""

import pytest
import torch
import torch.nn.functional as F
from fill import fill
from ops_golden import Golden
from timm.models.swin_transformer import PatchMerging

from visionssm.layers.local_mixer import BiAttn
from visionssm.layers.ss2d import SS2D
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models.local_vim import LocalVimMixer
from visionssm.ops import api

VIM, VMAMBA, LOCAL = Golden("vim"), Golden("ss2d"), Golden("local")
LOCAL_CASES = {case["name"]: case for case in LOCAL.cases}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

# Published name -> the layer's: a stacked parameter takes one published tensor per direction.
STACKED = {
    "conv1d{}.weight": "conv1d_weight",
    "conv1d{}.bias": "conv1d_bias",
    "x_proj{}.weight": "x_proj_weight",
    "dt_proj{}.weight": "dt_projs_weight",
    "dt_proj{}.bias": "dt_projs_bias",
    "A{}_log": "A_logs",
    "A_log{}": "A_logs",
    "D{}": "Ds",
}


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    """The layers leave the choice to the operator; here it falls on `backend`."""
    monkeypatch.setattr(api, "choose_backend", lambda x, name, **operands: backend)


def places(published, suffixes):
    """{published name: (the layer's name, index of the direction or None)}, in the order of the directions."""
    table = {old.format(s): (new, k) for old, new in STACKED.items() for k, s in enumerate(suffixes)}
    return {name: table.get(name, (name, None)) for name in published}


def load(module, weights, suffixes=()):
    """Load published weights, strictly: those of the directions stacked, all in the layer's shapes."""
    stacks = {}
    for published, (name, k) in places(weights, suffixes).items():
        stacks.setdefault(name, {})[k] = weights[published]
    state = {
        name: parts[None] if None in parts else torch.stack([parts[k] for k in sorted(parts)]) for name, parts in stacks.items()
    }
    module.load_state_dict({name: t.reshape(module.get_parameter(name).shape) for name, t in state.items()})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["mixer_L29", "mixer_L1"])
def test_vim(case, dtype):
    weights = {name: torch.from_numpy(array).to(dtype) for name, array in VIM.inputs(case).items()}
    x, w = weights.pop("x").requires_grad_(), weights.pop("w")
    mixer = VimMixer(32, dtype=dtype)
    load(mixer, weights, ("", "_b"))
    out = mixer(x)
    out.backward(w)
    actual = {"out": out.detach(), "grad.x": x.grad}
    for published, (name, k) in places(weights, ("", "_b")).items():
        gradient = mixer.get_parameter(name).grad
        actual[f"grad.{published}"] = gradient if k is None else gradient[k]
    VIM.compare(case, {name: t.numpy() for name, t in actual.items()}, TOLERANCE[dtype])


def filled(case, dtype=torch.float64):
    return {name: torch.from_numpy(fill(name, shape)).to(dtype) for name, shape in case["state_dict"]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", VMAMBA.cases, ids=lambda case: case["tag"])
def test_vmamba(case, dtype):
    """Gated and not, with and without convolution bias, N = 1 and 16, in both layouts; the reference outputs are float32."""
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
    load(mixer, weights)
    data = {name: torch.from_numpy(array).to(dtype) for name, array in VMAMBA.inputs(case["tag"]).items()}
    x = data["x"].requires_grad_()
    y = mixer(x.movedim(1, -1)).movedim(-1, 1) if case["channel_first"] else mixer(x)
    y.backward(data["w"])
    actual = {"y": y.detach(), "dx": x.grad} | {f"d:{name}": p.grad for name, p in mixer.named_parameters()}
    VMAMBA.compare(case["tag"], {name: t.numpy() for name, t in actual.items()}, 1e-5)


class SearchedAttn(torch.nn.Module):
    """The search's super-net: the directions go through BiAttn apart, are normed, and weighed by a softmax."""

    def __init__(self, attn, weights):
        super().__init__()
        self.attn, self.weights = attn, weights

    def forward(self, y):
        share = torch.softmax(self.weights.flatten(), 0)
        apart = [self.attn(y[:, k : k + 1]) for k in range(y.shape[1])]
        return sum(s * F.layer_norm(m, m.shape[-1:], eps=1e-5) for s, m in zip(share, apart, strict=True))


@pytest.mark.parametrize("name", [name for name, case in LOCAL_CASES.items() if "directions" in case])
def test_local_mamba(name):
    """Both mixers over windows that pad, odd and non-square grids, class tokens, and the super-nets' eight paths."""
    case = LOCAL_CASES[name]
    weights, paths, grid = filled(case), tuple(case["directions"]), tuple(case["grid"])
    search = weights.pop("multi_scan.weights", None)
    x = torch.from_numpy(LOCAL.inputs(name)["in"]).double()
    if "ss2d" in name:
        mixer = SS2D(32, 16, 2.0, paths, gate=True, conv_bias=True, scan_attn=BiAttn, dtype=torch.float64)
        load(mixer, {key.replace("multi_scan.attn.", "scan_attn."): t for key, t in weights.items()})
        if search is not None:
            mixer.scan_attn = SearchedAttn(mixer.scan_attn, search)
        arguments = (x,)
    else:
        mixer = LocalVimMixer(32, paths, class_token="_cls_" in name, dtype=torch.float64)
        load(mixer, weights, [f"_{k}" for k in range(len(paths))])
        if search is not None:
            mixer.attn = SearchedAttn(mixer.attn, search)
        arguments = (x, grid)
    with torch.no_grad():
        out = mixer(*arguments)
    LOCAL.compare(name, {"out": out.numpy()}, 1e-5)


def test_local_channel_attention():
    attn = BiAttn(32, dtype=torch.float64)
    attn.load_state_dict(filled(LOCAL_CASES["biattn"]))
    with torch.no_grad():
        out = attn(torch.from_numpy(LOCAL.inputs("biattn")["in"]).double()[:, None])
    LOCAL.compare("biattn", {"out": out.numpy()}, 1e-5)


def test_local_patch_merging():
    """timm's 2 x 2 merging, which our hierarchical models use, on a map with odd height."""
    layer = PatchMerging(16, 32, dtype=torch.float64)
    layer.load_state_dict(filled(LOCAL_CASES["patch_merging_5x6"]))
    with torch.no_grad():
        out = layer(torch.from_numpy(LOCAL.inputs("patch_merging_5x6")["in"]).double())
    LOCAL.compare("patch_merging_5x6", {"out": out.numpy()}, 1e-5)
