"""visionssm.Backbone: where it resolves, what it returns, loads, freezes; the necks."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from mmengine.model import BaseModule

from golden.fill import fill
from parity import check_feature, images, load_golden, published_weights
from visionssm.engine.optim import OptimWrapperConstructor
from visionssm.errors import UserError
from visionssm.layers.pos_embed import take_token
from visionssm.openmmlab import Backbone, ResamplingNeck, SimpleFeaturePyramid
from visionssm.weights.convert import to_own_names

SIZES = [(65, 102), (33, 47), (64, 96)]


@pytest.mark.parametrize("package", ["mmdet", "mmseg", "mmpretrain"])
def test_resolves_without_custom_imports(package):
    """In a fresh process, from the package's own registry."""
    code = f"""
from {package}.registry import MODELS
print(type(MODELS.build(dict(type="visionssm.Backbone", model_name="vmamba_nano"))).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["Backbone"], run.stderr


def test_imports_nothing_of_openmmlab():
    code = """
import sys, visionssm.openmmlab
print([name for name in sys.modules if name.split(".")[0] in ("mmcv", "mmdet", "mmseg", "mmpretrain")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stdout + run.stderr


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "arguments", "channels"),
    [
        ("vmamba_nano", {}, (64, 96, 128, 128)),
        ("vmamba_nano", {"out_indices": (1, -1)}, (96, 128)),
        ("local_vmamba_nano", {"out_indices": (0, 2)}, (64, 128)),
        ("vim_nano", {"out_indices": (0, 2), "tap": "norm"}, (160, 160)),
        ("local_vim_nano", {"out_indices": (1, 3), "tap": "mixer", "out_norm": True}, (128, 128)),
        ("resnet18", {"out_indices": (1, 2, 3, 4)}, (64, 128, 256, 512)),
    ],
)
def test_maps(name, arguments, channels, size):
    backbone = Backbone(name, **arguments).eval()
    maps = backbone(torch.randn(2, 3, *size))
    assert backbone.out_channels == channels == tuple(level.shape[1] for level in maps)
    for level, stride in zip(maps, backbone.strides, strict=True):
        assert level.is_contiguous()
        assert all(side in (length // stride, -(-length // stride)) for side, length in zip(level.shape[2:], size, strict=True))
        if backbone.out_norm:
            assert level.mean(1).abs().max() < 1e-4


@torch.inference_mode()
def test_maps_are_the_published_ones():
    """Weights under the published names, norms included, against maps recorded from the published backbone."""
    golden = load_golden("vmamba_tiny_s1l8")["dense"]
    backbone = Backbone("vmamba_tiny_s1l8").eval()
    norms = {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in golden["extra_state_dict"]}
    published = {key: value for key, value in published_weights("vmamba_tiny_s1l8").items() if not key.startswith("classifier.")}
    dense = {f"backbone.{key}": value for key, value in (published | norms).items()}
    ours = to_own_names(dense, timm.create_model("vmamba_tiny_s1l8", num_classes=0))
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in ours.items()}, strict=True)
    for case in golden["cases"]:
        for output, (stage, summary) in zip(backbone(images(case)), case["outputs"].items(), strict=True):
            check_feature("vmamba_tiny_s1l8", {"name": "Backbone"}, stage, output, summary)


@pytest.mark.parametrize("name", ["vim_nano", "local_vim_nano"])
def test_mixer_tap_is_what_the_layer_adds(name):
    """Without drop path a layer adds its mixer's output to the stream."""
    mixer, stream = Backbone(name, out_indices=(0,), tap="mixer").eval(), Backbone(name, out_indices=(0,)).eval()
    stream.load_state_dict(mixer.state_dict())
    inputs = []
    stream.model.layers[0].register_forward_hook(lambda _module, arguments, _output: inputs.append(arguments[0]))
    x = torch.randn(1, 3, 64, 96)
    after = stream(x)[0]
    tokens = inputs[0] if name == "local_vim_nano" else take_token(inputs[0])[0]
    before = tokens.unflatten(1, after.shape[2:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixer(x)[0], after - before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"tap": "mixer"}])
def test_checkpointing_changes_nothing(arguments):
    """The same maps and gradients, with the activations computed twice."""
    plain = Backbone("vim_nano", out_indices=(1, 4), **arguments)
    saving = Backbone("vim_nano", out_indices=(1, 4), with_cp=True, **arguments)
    saving.load_state_dict(plain.state_dict())
    calls = []
    saving.model.layers[0].norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 48)
    for backbone in (plain, saving):
        sum(level.square().sum() for level in backbone(x)).backward()
    assert len(calls) == 2
    for (name, ours), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_state_dict_has_the_names_that_convert_writes():
    backbone = Backbone("vmamba_nano")
    trunk = timm.create_model("vmamba_nano", num_classes=0).state_dict()
    norms = {f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert set(backbone.state_dict()) == {name for name in trunk if not name.startswith("norm.")} | norms
    other = copy.deepcopy(backbone)
    for parameter in other.parameters():
        parameter.data.normal_()
    inside = torch.nn.ModuleDict({"backbone": other})
    outer = torch.nn.ModuleDict({"backbone": backbone})
    outer.load_state_dict(inside.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outer.parameters(), inside.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"layers\.9\.x"):
        outer.load_state_dict({**inside.state_dict(), "backbone.layers.9.x": torch.ones(1)})


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_pretrained_weights_survive_init_weights(tmp_path, prefix):
    """Of a classifier's file, or of a training run's; the detector's own init_weights comes after."""
    source = timm.create_model("vmamba_nano", num_classes=10)
    torch.save({"state_dict": {prefix + name: value for name, value in source.state_dict().items()}}, tmp_path / "epoch_1.pth")
    parent = BaseModule()
    parent.backbone = Backbone("vmamba_nano", pretrained=str(tmp_path / "epoch_1.pth"))
    parent.init_weights()
    assert torch.equal(parent.backbone.model.layers[3].blocks[0].op.in_proj.weight, source.layers[3].blocks[0].op.in_proj.weight)
    with pytest.raises(UserError, match="of another model"):
        Backbone("vim_nano", pretrained=str(tmp_path / "epoch_1.pth"))
    with pytest.raises(UserError, match="no published checkpoint"):
        Backbone("vmamba_nano", pretrained=str(tmp_path / "missing.pth"))


def test_frozen_stages_and_batch_norms():
    backbone = Backbone("vmamba_nano", frozen_stages=2, drop_path_rate=0.5).train()
    learning = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not any(
        name.startswith(("model.patch_embed", "model.layers.0", "model.layers.1", "outnorm0", "outnorm1")) for name in learning
    )
    assert any(name.startswith("model.layers.2") for name in learning)
    assert not backbone.model.layers[1].blocks[1].drop_path1.training
    assert backbone.model.layers[2].blocks[1].drop_path1.training
    x = torch.randn(2, 3, 32, 32)
    first, again = backbone(x), backbone(x)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[3], again[3])
    backbone(x)[3].sum().backward()
    assert Backbone("resnet18", out_indices=(4,), norm_eval=True).train().model.bn1.training is False
    assert Backbone("resnet18", out_indices=(4,)).train().model.bn1.training is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    backbone = Backbone("vmamba_nano")
    with torch.autocast("cpu", dtype):
        maps = backbone(torch.randn(1, 3, 32, 48))
    sum(level.float().sum() for level in maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)


@pytest.mark.parametrize("with_cp", [False, True])
def test_a_precision_of_its_own(with_cp):
    """The maps and gradients of autocast around the backbone, in float32 outside."""
    backbone = Backbone("vmamba_nano", with_cp=with_cp)
    x = torch.randn(1, 3, 33, 47)
    with torch.autocast("cpu", torch.bfloat16):
        around = backbone(x)
    backbone.autocast_dtype = torch.bfloat16
    own = backbone(x)
    assert {level.dtype for level in own} == {torch.float32}
    assert all(torch.equal(level, other.float()) for level, other in zip(own, around, strict=True))
    gradients = [
        torch.autograd.grad(sum(m.float().square().sum() for m in maps), list(backbone.parameters())) for maps in (around, own)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


def test_batch_norms_become_synchronised():
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(Backbone("resnet18", out_indices=(1, 4)))
    assert isinstance(backbone.model.bn1, torch.nn.SyncBatchNorm)
    assert [tuple(level.shape[1:]) for level in backbone(torch.randn(2, 3, 64, 64))] == [(64, 16, 16), (512, 2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "vmamba_nan"}, "unknown model 'vmamba_nan'; did you mean vmamba_nano"),
        ({"model_name": "vmamba_nano", "out_indices": (0, 4)}, r"out_indices: vmamba_nano has 4 levels.*0 to 3, got \(0, 4\)"),
        ({"model_name": "vmamba_nano", "out_indices": (2, 1)}, "expected ascending numbers"),
        ({"model_name": "vmamba_nano", "out_indices": ()}, "expected ascending numbers"),
        ({"model_name": "vmamba_nano", "out_indices": 3}, "expected ascending numbers"),
        ({"model_name": "vmamba_nano", "out_indices": None}, "expected ascending numbers"),
        ({"model_name": "vmamba_nano", "out_indices": (False, True)}, "expected ascending numbers"),
        ({"model_name": None}, "model_name: got None, expected a name"),
        ({"model_name": "vmamba_nano", "num_classes": 10}, "num_classes: a backbone has no classifier"),
        ({"model_name": "vmamba_nano", "frozen_stages": "1"}, "has 4 stages, got '1', expected -1 to 4"),
        ({"model_name": "vmamba_nano", "frozen_stages": 1.5}, "has 4 stages, got 1.5, expected -1 to 4"),
        ({"model_name": "vmamba_nano", "frozen_stages": 7}, "frozen_stages: vmamba_nano has 4 stages, got 7"),
        ({"model_name": "vmamba_nano", "tap": "hidden"}, "tap: got 'hidden', expected one of stream, norm, mixer"),
        ({"model_name": "vmamba_nano", "tap": "mixer"}, "'mixer' is for Vim and LocalVim"),
        ({"model_name": "vmamba_nano", "init_cfg": {}}, "init_cfg: vmamba_nano has no such argument"),
        ({"model_name": "vmamba_nano", "drop_path_rat": 0.1}, "did you mean drop_path_rate"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Backbone(**arguments)


def test_necks():
    maps = tuple(torch.randn(2, 32, 6, 9) for _ in range(4))
    pyramid = SimpleFeaturePyramid(32, 16)(maps)
    assert [tuple(level.shape[1:]) for level in pyramid] == [(16, 24, 36), (16, 12, 18), (16, 6, 9), (16, 3, 4), (16, 2, 2)]
    resampled = ResamplingNeck(32)(maps)
    assert [tuple(level.shape[1:]) for level in resampled] == [(32, 24, 36), (32, 12, 18), (32, 6, 9), (32, 3, 4)]
    assert resampled[2] is maps[2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimpleFeaturePyramid(24)([torch.zeros(1, 32, 4, 4)]), r"the backbone's maps have \[32\] channels.*\[24\]"),
        (lambda: ResamplingNeck(32)([torch.zeros(1, 32, 4, 4)] * 3), r"\[32, 32, 32\] channels"),
        (lambda: SimpleFeaturePyramid([32] * 4), r"in_channels: got \[32, 32, 32, 32\], expected one number"),
        (lambda: ResamplingNeck([32] * 4), r"in_channels: got \[32, 32, 32, 32\], expected one number"),
        (lambda: SimpleFeaturePyramid(32, scales=(3,)), "scales: got 3, expected some of 4.0, 2.0, 1.0, 0.5"),
        (lambda: SimpleFeaturePyramid(32, num_outs=2), "num_outs: got 2, expected at least 4"),
        (lambda: ResamplingNeck(32, norm_cfg={"type": "GN"}), "norm_cfg.type: got 'GN', expected BN or SyncBN"),
    ],
)
def test_bad_necks(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_layer_decay_of_a_detector():
    """The heads learn at the full rate, the last layer at one step less, the embeddings slowest."""
    detector = torch.nn.ModuleDict({"backbone": Backbone("vim_nano", out_indices=(4,)), "head": torch.nn.Linear(2, 2)})
    build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1.0}}, {"layer_decay": 0.5})
    rate = {id(p): group["lr"] for group in build(detector).optimizer.param_groups for p in group["params"]}
    layers = detector["backbone"].model.layers
    assert rate[id(detector["head"].weight)] == 1.0
    for index, layer in enumerate(layers):
        assert {rate[id(p)] for p in layer.parameters()} == {0.5 ** (len(layers) - index)}
    assert rate[id(detector["backbone"].model.pos_embed)] == 0.5 ** (len(layers) + 1)


def test_no_decay_patterns():
    model = torch.nn.ModuleDict({"backbone": Backbone("vmamba_nano"), "head": torch.nn.Linear(2, 2)})
    config = {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}
    build = OptimWrapperConstructor(config, {"no_decay": ("*norm*",)})
    decay = {id(p): group["weight_decay"] for group in build(model).optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name
