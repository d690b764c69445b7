"""VMamba against the published code, all key generations, and its own arguments."""

import pytest
import timm
import torch

import visionssm
from parity import build, check_feature, check_logits, images, load_golden, published_weights
from visionssm.models.vmamba import checkpoint_filter_fn

PARAMETERS = {
    "vanilla_vmamba_tiny": 22_893_448,
    "vanilla_vmamba_small": 44_417_416,
    "vanilla_vmamba_base": 76_254_056,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_0220": 32_484_904,
}
GOLDEN = ("vmamba_tiny_s1l8", "vmamba_tiny_s2l5", "vmamba_small_s2l15", "vmamba_tiny_0220", "vanilla_vmamba_tiny")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*GOLDEN, "vanilla_vmamba_tiny_published_keys"])
@torch.inference_mode()
def test_parity(name):
    model = build(name.removesuffix("_published_keys"), checkpoint_filter_fn, golden=name)
    for case in load_golden(name)["cases"]:
        final, features = model.forward_intermediates(images(case))
        for i, (stage, summary) in enumerate(case["features"].items()):
            check_feature(name, case, stage, features[i], summary)
        check_logits(name, case, model.forward_head(final))


@pytest.mark.parametrize("name", GOLDEN)
def test_dense_checkpoint_loads_strictly(name):
    """A detector's file: backbone prefix, output norms instead of a classifier, foreign keys beside them."""
    weights = {k: v for k, v in published_weights(name).items() if not k.startswith("classifier.")}
    weights |= {k: torch.randn(shape) for k, shape in load_golden(name)["dense"]["extra_state_dict"]}
    file = {
        "state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {"rpn_head.rpn_conv.weight": torch.zeros(1)},
        "meta": {},
    }
    model = timm.create_model(name, num_classes=0)
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)
    torch.testing.assert_close(model.norm.weight, weights["outnorm3.weight"], rtol=0, atol=0)


def test_four_dimensional_linears_and_prefixes():
    """Channel-first code saved its linears as 1x1 convolutions; data-parallel code saved a prefix."""
    plain = published_weights("vmamba_tiny_s1l8")
    linear = (".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight", ".head.weight")
    old = {f"module.{k}": v[..., None, None] if k.endswith(linear) else v for k, v in plain.items()}
    model = timm.create_model("vmamba_tiny_s1l8", device="meta")
    expected, got = checkpoint_filter_fn(plain, model), checkpoint_filter_fn({"model": old, "epoch": 3}, model)
    assert expected.keys() == got.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert got[key].shape == value.shape
        assert torch.equal(got[key], expected[key])


@pytest.mark.parametrize("name", ["vmamba_nano", "vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
def test_filter_keeps_our_own_state_dict(name):
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[k] is own[k] for k in own)


def test_checkpoint_of_another_variant_is_refused():
    model = timm.create_model("vmamba_tiny_s2l5")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"of another model than this VMamba: unexpected .*and \d+ more; of other shapes"
    ) as refusal:
        visionssm.load_checkpoint(model, {"model": published_weights("vmamba_tiny_s1l8")})
    assert len(str(refusal.value)) < 600
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # nothing was loaded in part


def test_load_checkpoint():
    model = timm.create_model("vanilla_vmamba_tiny")
    weights = published_weights("vanilla_vmamba_tiny_published_keys")
    visionssm.load_checkpoint(model, {"model": weights, "epoch": 3})
    torch.testing.assert_close(model.head.fc.weight.detach(), weights["head.weight"], rtol=0, atol=0)
    with pytest.raises(TypeError, match="source: expected a path or a dict"):
        visionssm.load_checkpoint(model, [weights])
    with pytest.raises(TypeError, match="expected one of visionssm's models, got Linear"):
        visionssm.load_checkpoint(torch.nn.Linear(1, 1), weights)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 47), (64, 32)])
def test_any_image_size(size):
    model = timm.create_model("vmamba_nano", num_classes=3).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": (8, 16)}, "embed_dim: got 2 widths for 4 stages"),
        ({"paths": (("h",), ("v",))}, "paths: got 2 tuples of path names for 9 blocks"),
        ({"patch_size": 3}, "patch_size: expected 2 or 4"),
        ({"paths": ("h", "w0")}, "unknown path 'w0'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vmamba_nano", **kwargs)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vanilla_vmamba_tiny", (1, 3, 3, 64), "3 x 64 pixels is smaller than one 4 x 4 patch"),
        ("vmamba_nano", (1, 4, 32, 32), r"expected \(batch, 3, H, W\), got shape \(1, 4, 32, 32\)"),
        ("vmamba_nano", (3, 32, 32), "expected"),
        ("vmamba_nano", (1, 3, 0, 32), "0 x 32 pixels"),
    ],
)
def test_bad_images(name, shape, message):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_initial_values():
    """Linears truncated normal of std 0.02, steps in [1e-3, 1e-1], A = -(1..N), D = 1; a reset gives the same distributions."""
    model = timm.create_model("vanilla_vmamba_tiny")
    model.init_weights()
    op = model.layers[1].blocks[0].op
    step = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 1e-1 * 1.001
    assert torch.allclose(op.A_logs.exp()[2, 3], torch.arange(1.0, 17.0))
    assert (op.Ds == 1).all()
    assert op.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert op.x_proj_weight.abs().max() <= 384**-0.5
    assert op.dt_projs_weight.abs().max() <= 12**-0.5
