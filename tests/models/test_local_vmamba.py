"""LocalVMamba against the published code, its own paths, checkpoints and arguments."""

from functools import partial

import pytest
import timm
import torch

import visionssm  # noqa: F401
from golden.fill import fill
from golden.ops_golden import Golden
from parity import build, check_feature, check_logits, images, load_golden, published_weights
from visionssm.layers.local_mixer import BiAttn
from visionssm.layers.ss2d import SS2D
from visionssm.models.local_vmamba import SEARCHED_PATHS_SMALL, SEARCHED_PATHS_TINY, checkpoint_filter_fn

PARAMETERS = {"local_vmamba_tiny": 25_527_160, "local_vmamba_small": 49_748_536}
MIXERS = Golden("local")
MIXER_CASES = {case["name"]: case for case in MIXERS.cases}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@torch.inference_mode()
def test_parity():
    """Published features name a stage's map `layers.i.blocks` before and `layers.i` after the merging that is our next stage's."""
    name = "local_vmamba_tiny"
    model = build(name, checkpoint_filter_fn)
    features = {}

    def keep(feature, module, args, out):
        features[feature] = out

    model.patch_embed.register_forward_hook(partial(keep, "patch_embed"))
    model.layers[0].blocks[0].register_forward_hook(partial(keep, "layers.0.blocks.0"))
    for i, stage in enumerate(model.layers):
        stage.blocks.register_forward_hook(partial(keep, f"layers.{i}.blocks"))
        merging = model.layers[i + 1].downsample if i < 3 else stage
        merging.register_forward_hook(partial(keep, f"layers.{i}"))
    for case in load_golden(name)["cases"]:
        check_logits(name, case, model(images(case)))
        for feature, summary in case["features"].items():
            check_feature(name, case, feature, features[feature], summary)


@pytest.mark.parametrize("name", [name for name in MIXER_CASES if name.startswith("ss2d")])
@torch.inference_mode()
def test_mixer(name):
    case = MIXER_CASES[name]
    weights = {f"layers.0.blocks.0.op.{key}": torch.from_numpy(fill(key, shape)) for key, shape in case["state_dict"]}
    weights = checkpoint_filter_fn({"patch_embed.0.bias": torch.zeros(1), **weights}, timm.create_model("local_vmamba_nano"))
    prefix = "layers.0.blocks.0.op."
    mixer = SS2D(32, 16, 2.0, tuple(case["directions"]), gate=True, conv_bias=True, scan_attn=BiAttn, dtype=torch.float64)
    mixer.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, strict=True)
    out = mixer(torch.from_numpy(MIXERS.inputs(name)["in"]).double())
    MIXERS.compare(name, {"out": out.numpy()}, 1e-5)


@pytest.mark.parametrize(
    ("name", "paths"), [("local_vmamba_tiny", SEARCHED_PATHS_TINY), ("local_vmamba_small", SEARCHED_PATHS_SMALL)]
)
def test_searched_paths(name, paths):
    model = timm.create_model(name, device="meta")
    assert [block.op.paths for stage in model.layers for block in stage.blocks] == list(paths)


def test_paths_are_an_argument():
    cross = (("h", "h_flip", "v", "v_flip"),) * 15
    model = timm.create_model("local_vmamba_tiny", device="meta", paths=cross)
    assert [block.op.paths for stage in model.layers for block in stage.blocks] == list(cross)


@pytest.mark.parametrize("name", ["local_vmamba_tiny", "local_vmamba_nano"])
def test_filter_keeps_our_own_state_dict(name):
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[k] is own[k] for k in own)


def test_dense_checkpoint_loads_strictly():
    """A detector's file: backbone prefix, output norms instead of a classifier, foreign keys beside them."""
    weights = {k: v for k, v in published_weights("local_vmamba_tiny").items() if not k.startswith("classifier.")}
    for i in range(4):
        weights |= {f"outnorm{i}.{leaf}": torch.randn(96 * 2**i) for leaf in ("weight", "bias")}
    file = {"state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {"rpn_head.rpn_conv.weight": torch.zeros(1)}}
    model = timm.create_model("local_vmamba_tiny", num_classes=0)
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)
    assert torch.equal(model.norm.weight, weights["outnorm3.weight"])
    own = "layers.1.blocks.1.op.scan_attn.global_reduce.weight"
    published = "layers.1.blocks.1.op.multi_scan.attn.global_reduce.weight"
    assert torch.equal(model.state_dict()[own], weights[published])


def test_checkpoint_of_another_variant_is_refused():
    model = timm.create_model("local_vmamba_tiny")
    with pytest.raises(RuntimeError, match=r"Missing key.*scan_attn"):
        model.load_state_dict(checkpoint_filter_fn(published_weights("vanilla_vmamba_tiny"), model), strict=True)


@pytest.mark.parametrize("size", [(2, 2), (7, 5), (33, 47), (64, 32)])
def test_any_image_size(size):
    model = timm.create_model("local_vmamba_nano", num_classes=3).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


def test_compiles_as_one_graph():
    args = {"depths": (1, 1), "embed_dim": (16, 32), "paths": (("h", "w2_flip"), ("v", "w7"))}
    model = timm.create_model("local_vmamba_nano", **args).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((32, 32), (18, 40)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_initial_values():
    """Linears, those of the channel attention too, truncated normal of std 0.02 with bias 0; the scan by Mamba's rules."""
    model = timm.create_model("local_vmamba_tiny")
    op = model.layers[2].blocks[3].op
    for linear in (op.in_proj, op.out_proj, op.scan_attn.global_reduce, op.scan_attn.channel_select):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (op.scan_attn.channel_select.bias == 0).all()
    step = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 1e-1 * 1.001
    assert torch.allclose(op.A_logs.exp()[2, 3], torch.arange(1.0, 17.0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"paths": (("h", "v"),) * 5}, "paths: got path names for 5 layers, expected 9"),
        ({"depths": (1, 1, 1, 1)}, "paths: got path names for 9 layers, expected 4"),
        ({"paths": ("h", "v", "h_flip", "v_flip")}, "paths: expected one tuple of path names for each of 9 layers"),
        ({"paths": (("h", "w0"),) * 9}, "paths: unknown path 'w0'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("local_vmamba_nano", **kwargs)


def test_unknown_argument():
    with pytest.raises(TypeError, match="window"):
        timm.create_model("local_vmamba_nano", window=7)


def test_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="3 x 64 pixels is smaller than one 4 x 4 patch"):
        timm.create_model("local_vmamba_tiny")(torch.zeros(1, 3, 3, 64))
