"""Vim against the published code, at any image size, and its checkpoints and arguments."""

import pytest
import timm
import torch
import torch.nn.functional as F

from golden.ops_golden import Golden
from parity import build, check_feature, check_logits, images, load_golden, published_weights
from visionssm.layers.pos_embed import take_token
from visionssm.layers.ssm_init import A_from_log
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models.vim import VisionMamba, checkpoint_filter_fn
from visionssm.ops import BIDIRECTIONAL, cross_selective_scan_packed

PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
}
CASES = [(name, case["name"]) for name in list(PARAMETERS)[:2] for case in load_golden(name)["cases"]]
MIXERS = Golden("vim")
BRANCHES = {  # ours: the names of the published forward and backward branch
    "conv1d_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv1d_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
    "dt_projs_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_projs_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_logs": ("A_log", "A_b_log"),
    "Ds": ("D", "D_b"),
}


def tiny(**kwargs):
    """A Vim of two narrow blocks, patches of 4 pixels, as a classifier of 32 x 32 images."""
    return VisionMamba(**{"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 5, **kwargs}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_nano_size():
    model = timm.create_model("vim_nano", num_classes=10, device="meta")
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


# --- against the published code ---------------------------------------------------------------------------------------


def gated_branches(mixer, x):
    """The two scans of a mixer's input, gated, before their mean: (batch, inner, L) each, as the published code had them."""
    u, x_dbl, z = mixer.scan_inputs(x)
    ys = cross_selective_scan_packed(
        u,
        x_dbl,
        A_from_log(mixer.A_logs),
        mixer.Ds,
        paths=BIDIRECTIONAL,
        dt_weight=mixer.dt_projs_weight,
        dt_bias=mixer.dt_projs_bias,
        merge=False,
    )
    return [(y * F.silu(z)).mT for y in ys.squeeze(2).unbind(1)]


def capture_features(model, x):
    """Logits, and every feature that the records name."""
    features = {}
    hooks = [model.patch_embed.register_forward_hook(lambda m, a, out: features.update(patch_embed=out.flatten(1, 2)))]
    for i in (0, 1, 11, 23):
        block, name = model.layers[i], f"layers.{i}"
        hooks.append(
            block.register_forward_hook(
                lambda m, a, out, name=name: features.update({f"{name}.residual": a[0], f"{name}.stream": out})
            )
        )
        hooks.append(block.mixer.register_forward_hook(lambda m, a, out, name=name: features.update({f"{name}.hidden": out})))
    final = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    normed = model.layers[0].norm(features["layers.0.residual"])
    features |= {"tokens": features["layers.0.residual"], "layers.0.normed": normed, "norm_f": final}
    features["layers.0.mixer.forward"], features["layers.0.mixer.backward"] = gated_branches(model.layers[0].mixer, normed)
    features["pre_logits"] = model.forward_head(final, pre_logits=True)
    return model.forward_head(final), features


@pytest.mark.parametrize(("name", "case_name"), CASES)
@torch.inference_mode()
def test_parity(name, case_name):
    """Square, odd and non-square grids through the run-time resize of the position embedding."""
    case = next(case for case in load_golden(name)["cases"] if case["name"] == case_name)
    logits, features = capture_features(build(name, checkpoint_filter_fn), images(case))
    assert features.keys() == case["features"].keys()
    for feature, summary in case["features"].items():
        check_feature(name, case, feature, features[feature], summary)
    check_logits(name, case, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ["mixer_L29", "mixer_L1"])
def test_mixer_and_gradients(case, dtype):
    data = {name: torch.from_numpy(array).to(dtype) for name, array in MIXERS.inputs(case).items()}
    weights = {f"layers.0.mixer.{name}": t for name, t in data.items() if name not in ("x", "w")}
    mixer = VimMixer(32, dtype=dtype)
    filtered = checkpoint_filter_fn(weights, tiny())
    mixer.load_state_dict({name.removeprefix("layers.0.mixer."): t for name, t in filtered.items()}, strict=True)
    x = data["x"].requires_grad_()
    out = mixer(x)
    out.backward(data["w"])
    grads = {"x": x.grad, "in_proj.weight": mixer.in_proj.weight.grad, "out_proj.weight": mixer.out_proj.weight.grad}
    for ours, names in BRANCHES.items():
        grads |= dict(zip(names, mixer.get_parameter(ours).grad.unbind(0), strict=True))
    results = {"out": out.detach(), **{f"grad.{name}": grad for name, grad in grads.items()}}
    MIXERS.compare(case, {name: t.numpy() for name, t in results.items()}, 1e-9 if dtype == torch.float64 else 1e-5)


def test_mixer_is_symmetric():
    """Reversing the sequence and exchanging the two directions' weights reverses the output."""
    mixer, mirrored = VimMixer(16, dtype=torch.float64), VimMixer(16, dtype=torch.float64)
    mirrored.load_state_dict({k: v.flip(0) if k in BRANCHES else v for k, v in mixer.state_dict().items()})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(mirrored(x.flip(1)).flip(1), mixer(x))


# --- image sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (28, 44), (35, 70)])
def test_any_image_size(size):
    assert tiny()(torch.randn(2, 3, *size)).shape == (2, 5)


def test_pixels_that_fill_no_patch_are_left_out():
    model, x = tiny(), torch.randn(1, 3, 30, 39)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x[:, :, :28, :36]), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(24, 40), (20, 20), 64])
def test_set_input_size_equals_the_resize_at_run_time(size):
    model = tiny()
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = model(x)
        loaded = tiny(img_size=size)
        loaded.load_state_dict(checkpoint_filter_fn(model.state_dict(), loaded), strict=True)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
        model.pos_embed.requires_grad_(False)
        model.set_input_size(size)
        assert model.pos_embed.shape[1] == height * width // 16 + 1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    assert not model.pos_embed.requires_grad
    assert timm.models.get_model_args(model)["img_size"] == (height, width)
    before = model.pos_embed
    model.set_input_size()
    assert model.pos_embed is before


def test_class_token_keeps_its_position_through_a_resize():
    model = tiny(img_size=(20, 12))  # 5 x 3 patches, the token's row is 7
    row = model.pos_embed[:, 7:8].detach().clone()
    model.set_input_size((12, 12))
    torch.testing.assert_close(take_token(model.pos_embed)[1], row, rtol=0, atol=0)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def published(model):
    """A state dict of `model` under the published names."""
    out = {}
    for key, value in model.state_dict().items():
        prefix, _, leaf = key.rpartition(".")
        if leaf in BRANCHES:
            value = value.unsqueeze(2) if leaf == "conv1d_weight" else value
            out |= {f"{prefix}.{name}": t for name, t in zip(BRANCHES[leaf], value.unbind(0), strict=True)}
        else:
            out[key] = value
    return out


def test_published_names():
    """`published` above inverts the filter and gives exactly the keys and shapes of a published file."""
    model = timm.create_model("vim_tiny_patch16_224", device="meta")
    shapes = {key: tuple(shape) for key, shape in load_golden("vim_tiny_patch16_224")["state_dict"]}
    assert {key: tuple(value.shape) for key, value in published(model).items()} == shapes


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "optimizer": {"state": {}}, "epoch": 299, "scaler": "none"},
        lambda weights: {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
        lambda weights: {"state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {"decode_head.bias": torch.ones(1)}},
    ],
    ids=["weights", "training state", "data parallel", "segmentor"],
)
@pytest.mark.parametrize("classes", [5, 0])
def test_file_layouts(wrap, classes):
    source = tiny()
    model = tiny(num_classes=classes)
    model.load_state_dict(checkpoint_filter_fn(wrap(published(source)), model), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), source.forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vim_nano", "vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224"])
def test_filter_keeps_our_own_state_dict(name):
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[k] is own[k] for k in own)


def test_square_checkpoint_for_a_grid_of_as_many_patches():
    """196 rows of a 14 x 14 grid are not those of a 7 x 28 grid."""
    model = timm.create_model("vim_tiny_patch16_224", img_size=(112, 448), device="meta")
    rows = torch.arange(197.0)[None, :, None].expand(1, 197, 192)
    weights = {"cls_token": torch.zeros(1, 1, 192), "pos_embed": rows}
    resized = checkpoint_filter_fn(weights, model)["pos_embed"]
    assert resized.shape == rows.shape
    assert not torch.equal(resized, rows)
    assert resized[0, 98, 0] == 98


def test_patch16_weights_start_the_stride8_model():
    model = timm.create_model("vim_tiny_patch16_stride8_224")
    model.load_state_dict(checkpoint_filter_fn(published_weights("vim_tiny_patch16_224"), model), strict=True)
    assert model.pos_embed.shape == (1, 730, 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"rope.freqs_cos": torch.zeros(64, 32)}), "rotary position tables"),
        (lambda w: w.pop("cls_token"), "no cls_token"),
        (lambda w: w.pop("layers.1.mixer.conv1d_b.bias"), r"lacks layers\.1\.mixer\.conv1d_b\.bias"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 60, 32)}), "59 patch rows"),
    ],
    ids=["rotary", "no class token", "one branch", "unknown grid"],
)
def test_other_layouts_are_refused(change, message):
    model = tiny()
    weights = published(model)
    change(weights)
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(weights, model)


def test_checkpoint_of_another_variant_is_refused():
    model = tiny(depth=3)
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.2\."):
        model.load_state_dict(checkpoint_filter_fn(published(tiny()), model), strict=True)


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_pooling():
    model, x = tiny(num_classes=0), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(x)
        patches = torch.cat([tokens[:, :32], tokens[:, 33:]], dim=1)
        torch.testing.assert_close(model(x), tokens[:, 32])
        for pool, expected in (("avg", patches.mean(1)), ("max", patches.amax(1)), ("", tokens), ("token", tokens[:, 32])):
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), expected)


def test_intermediates():
    model, x = tiny(depth=3), torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        assert [tuple(m.shape) for m in maps] == [(2, 32, 6, 10)] * 3
        ((tokens, class_token),) = model.forward_intermediates(
            x, indices=1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(torch.cat([tokens[:, :30], class_token, tokens[:, 30:]], dim=1), final)
        (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, maps[1], rtol=0, atol=0)
        model.prune_intermediate_layers([1], prune_norm=True)
        torch.testing.assert_close(take_token(model.forward_features(x))[0].unflatten(1, (6, 10)).permute(0, 3, 1, 2), maps[1])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_residual_stream_stays_float32_under_autocast():
    model, x, seen = tiny(), torch.randn(2, 3, 32, 32), {}
    model.layers[1].register_forward_hook(lambda m, a, out: seen.update(stream=out.dtype))
    model.layers[1].mixer.register_forward_hook(lambda m, a, out: seen.update(normed=a[0].dtype, mixer=out.dtype))
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert seen == {"stream": torch.float32, "normed": torch.float32, "mixer": torch.bfloat16}
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.02)
    model.bfloat16()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert seen == dict.fromkeys(seen, torch.bfloat16)


def test_compiles_to_one_graph():
    model, x = tiny(), torch.randn(2, 3, 28, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_weight_decay_spares_what_the_published_code_keeps_one_dimensional():
    """And the decay rates. Only what was 2-D there, and is neither a position nor a decay rate, is decayed."""
    model = timm.create_model("vim_nano")
    spared = model.no_weight_decay()
    assert spared <= {name for name, _ in model.named_parameters()}
    decayed = {name.rpartition(".mixer.")[2] for name, p in model.named_parameters() if p.ndim > 1 and name not in spared}
    assert decayed == {
        *("patch_embed.proj.weight", "head.weight", "in_proj.weight", "out_proj.weight"),
        *("conv1d_weight", "x_proj_weight", "dt_projs_weight"),
    }


def test_initial_values():
    """The published rules, also after the meta device; the backward step bias starts from 0, as it was trained."""
    model = timm.create_model("vim_tiny_patch16_224", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    mixer = model.layers[5].mixer
    step = F.softplus(mixer.dt_projs_bias[0])
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 1e-1 * 1.001
    assert (mixer.dt_projs_bias[1] == 0).all()
    assert torch.allclose(mixer.A_logs.exp()[1, 3], torch.arange(1.0, 17.0))
    assert (mixer.Ds == 1).all()
    assert (model.layers[5].norm.weight == 1).all()
    bounds = {
        "in_proj.weight": 192**-0.5,
        "x_proj_weight": 384**-0.5,
        "dt_projs_weight": 12**-0.5,
        "conv1d_weight": 0.5,
        "conv1d_bias": 0.5,
        "out_proj.weight": (384 * 24) ** -0.5,
    }
    for name, bound in bounds.items():
        assert mixer.get_parameter(name).abs().max().item() == pytest.approx(bound, rel=0.02)
    for p in (model.pos_embed, model.head.weight, model.cls_token):
        assert p.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert (model.patch_embed.proj.bias == 0).all()


def test_drop_path_grows_linearly():
    model = tiny(depth=5, drop_path_rate=0.2)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 3, 64), "3 x 64 pixels is smaller than one 4 x 4 patch"),
        ((1, 4, 32, 32), r"expected \(batch, 3, H, W\), got shape \(1, 4, 32, 32\)"),
        ((3, 32, 32), "expected"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_bad_arguments():
    with pytest.raises(ValueError, match="img_size: 3 x 3 pixels is smaller than one 4 x 4 patch"):
        tiny(img_size=3)
    with pytest.raises(ValueError, match="global_pool: got 'mean', expected one of 'token', 'avg'"):
        tiny(global_pool="mean")
    with pytest.raises(ValueError, match="img_size: 2 x 32 pixels"):
        tiny().set_input_size((2, 32))
