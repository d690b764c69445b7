"""LocalVim against the published code, in its own variants, at other sizes, and its own arguments."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import create_model
from timm.optim import param_groups_weight_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import visionssm  # noqa: F401
from golden.fill import fill
from golden.ops_golden import Golden
from parity import build, check_feature, check_logits, images, load_golden, published_weights
from visionssm.layers.local_mixer import BiAttn
from visionssm.layers.pos_embed import insert_token, take_token
from visionssm.models.local_vim import SEARCHED_PATHS, LocalVimMixer, RotaryTables, checkpoint_filter_fn

PARAMETERS = {"local_vim_tiny": 7_994_152, "local_vim_tiny_midclstok": 7_994_536, "local_vim_small": 27_783_784}
GOLDEN = ("local_vim_tiny", "local_vim_tiny_midclstok")
DENSE = "local_vim_tiny_backbone"
MIXERS = Golden("local")
MIXER_CASES = {case["name"]: case for case in MIXERS.cases}
PATHS = (("h", "v_flip", "w2", "w7_flip"), ("h_flip", "v", "w2_flip"))


def small(name="local_vim_tiny", **kwargs):
    """Two narrow layers of `name`, other weights in every tensor, for what does not depend on the size."""
    args = {"img_size": 64, "embed_dim": 32, "depth": 2, "paths": PATHS, "num_classes": 5} | kwargs
    return timm.create_model(name, **args).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def recorded(model):
    """Features by their published names, filled by each forward pass of `model`."""
    features = {}
    model.patch_embed.register_forward_hook(lambda m, args, out: features.update(patch_embed=out.flatten(1, 2)))
    for i, layer in enumerate(model.layers):
        layer.norm.register_forward_hook(lambda m, args, out, i=i: features.update({f"layers.{i}.residual": args[0]}))
        layer.mixer.register_forward_hook(lambda m, args, out, i=i: features.update({f"layers.{i}.hidden": out}))
    model.head.register_forward_hook(lambda m, args, out: features.update(head=out))
    return features


@pytest.mark.parametrize("name", GOLDEN)
@torch.inference_mode()
def test_parity(name):
    """Square, padded and non-square images; the dense wrapper's maps are the normed mixer outputs of four layers."""
    model = build(name, checkpoint_filter_fn)
    features = recorded(model)
    dense = {tuple(case["image"]): case for case in load_golden(DENSE)["cases"]} if name == "local_vim_tiny" else {}
    weights = published_weights(DENSE)
    for case in load_golden(name)["cases"]:
        check_logits(name, case, model(images(case)))
        for feature, summary in case["features"].items():
            check_feature(name, case, feature, features[feature], summary)
        if tuple(case["image"]) not in dense:
            continue
        case = dense.pop(tuple(case["image"]))
        for i, (output, summary) in enumerate(case["outputs"].items()):
            hidden = features[f"layers.{(4, 9, 14, 19)[i]}.hidden"]
            normed = F.layer_norm(hidden, hidden.shape[-1:], weights[f"outnorm_{i}.weight"], weights[f"outnorm_{i}.bias"])
            grid = summary["shape"][2:]
            check_feature(DENSE, case, output, normed.mT.reshape(-1, hidden.shape[-1], *grid), summary)
    assert not dense


@pytest.mark.parametrize("name", [name for name in MIXER_CASES if name.startswith("multimamba")])
@torch.inference_mode()
def test_mixer(name):
    """The layer on grids where windows pad, odd and non-square ones, with and without the class token."""
    case = MIXER_CASES[name]
    weights = {f"layers.0.mixer.{key}": torch.from_numpy(fill(key, shape)).double() for key, shape in case["state_dict"]}
    weights = checkpoint_filter_fn(weights, small(device="meta"))
    mixer = LocalVimMixer(32, tuple(case["directions"]), class_token="_cls_" in name, dtype=torch.float64)
    mixer.load_state_dict({key.removeprefix("layers.0.mixer."): value for key, value in weights.items()}, strict=True)
    out = mixer(torch.from_numpy(MIXERS.inputs(name)["in"]).double(), tuple(case["grid"]))
    MIXERS.compare(name, {"out": out.numpy()}, 1e-5)


@torch.inference_mode()
def test_channel_attention():
    attn = BiAttn(32, dtype=torch.float64)
    attn.load_state_dict({key: torch.from_numpy(fill(key, shape)) for key, shape in MIXER_CASES["biattn"]["state_dict"]})
    x = torch.from_numpy(MIXERS.inputs("biattn")["in"]).double()
    MIXERS.compare("biattn", {"out": attn(x.unsqueeze(1)).numpy()}, 1e-5)
    ys = torch.randn(2, 3, 4, 5, 32, dtype=torch.float64)  # every direction by itself, then the sum
    torch.testing.assert_close(attn(ys), sum(attn(ys[:, k : k + 1]) for k in range(3)))


def test_both_readings_of_local_vim_small():
    """The searched list of the paper and the list under the published code's name: one state dict, two functions."""
    unsearched = (("h", "h_flip", "w2", "w2_flip"),) * 20
    searched = timm.create_model("local_vim_small", device="meta")
    registered = timm.create_model("local_vim_small", device="meta", paths=unsearched)
    assert [layer.mixer.paths for layer in searched.layers] == list(SEARCHED_PATHS)
    assert [layer.mixer.paths for layer in registered.layers] == list(unsearched)
    assert [(k, v.shape) for k, v in searched.state_dict().items()] == [(k, v.shape) for k, v in registered.state_dict().items()]
    one, other = small(), small(paths=(("h", "h_flip", "w2", "w2_flip"), ("h", "h_flip", "w2")))
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert (one(x) - other(x)).abs().max() > 1e-3 * one(x).abs().max()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GOLDEN, "local_vim_nano"])
def test_filter_keeps_our_own_state_dict(name):
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[k] is own[k] for k in own)


@pytest.mark.parametrize("wrap", [lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w, "ema_model": None}])
def test_containers_and_prefixes(wrap):
    weights = published_weights("local_vim_tiny")
    model = timm.create_model("local_vim_tiny", device="meta")
    expected = checkpoint_filter_fn(weights, model)
    got = checkpoint_filter_fn(wrap({f"module.module.{k}": v for k, v in weights.items()}), model)
    assert expected.keys() == got.keys() == model.state_dict().keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_directions_keep_their_order():
    """Direction k of a published checkpoint becomes row k, each with a decay of its own."""
    weights = published_weights("local_vim_tiny")
    out = checkpoint_filter_fn(weights, timm.create_model("local_vim_tiny", device="meta"))
    for k in range(4):
        assert torch.equal(out["layers.3.mixer.A_logs"][k], weights[f"layers.3.mixer.A_log_{k}"])
        assert torch.equal(out["layers.3.mixer.Ds"][k], weights[f"layers.3.mixer.D_{k}"])
        assert torch.equal(out["layers.3.mixer.conv1d_weight"][k], weights[f"layers.3.mixer.conv1d_{k}.weight"][:, 0])


def test_dense_checkpoint_loads_strictly():
    """A segmentor's file: backbone prefix, norms of the mixers' outputs, neither classifier nor final norm, foreign keys."""
    weights = published_weights(DENSE)
    file = {"state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {"decode_head.conv_seg.weight": torch.zeros(1)}}
    model = timm.create_model("local_vim_tiny", num_classes=0)
    torch.nn.init.uniform_(model.norm_f.weight)
    before = model.norm_f.weight.clone()
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)
    assert torch.equal(model.layers[7].norm.weight, weights["layers.7.norm.weight"])
    assert torch.equal(model.norm_f.weight, before)
    model.prune_intermediate_layers([4, 9, 14, 19], prune_norm=True)
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_positions_are_resized_when_loaded(name):
    """A model built for another image size computes what the original one computes at that size."""
    model, other = small(name), small(name, img_size=(40, 96))
    assert other.pos_embed.shape[1] == 18 + (model.cls_token is not None)
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other), strict=True)
    x = torch.randn(1, 3, 40, 96)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_positions_of_a_published_grid_are_never_taken_for_another():
    """Published positions lie on a square; ours, of the same number, on the model's own grid."""
    model, wide = small(), small(img_size=(32, 128))
    published = {"pos_embed": model.pos_embed.detach(), "layers.0.mixer.D_0": torch.ones(64)}
    resized = checkpoint_filter_fn(published, wide)["pos_embed"]
    model.set_input_size((32, 128))
    assert torch.equal(resized, model.pos_embed)
    assert checkpoint_filter_fn(wide.state_dict(), wide)["pos_embed"].data_ptr() == wide.pos_embed.data_ptr()


@pytest.mark.parametrize(
    ("name", "message"),
    [("local_vim_tiny", "size mismatch for pos_embed"), ("local_vim_tiny_midclstok", r"Unexpected key.*cls_token")],
)
def test_checkpoint_of_another_variant_is_refused(name, message):
    model = small("local_vim_tiny")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(checkpoint_filter_fn(published_weights(name), model), strict=True)


def test_rotary_tables_of_a_checkpoint_must_be_the_models():
    model = timm.create_model("local_vim_tiny", num_classes=0, rope_grid=28)
    with pytest.raises(ValueError, match=r"rope.freqs_cos: .* made for rope_grid=28; try rope_grid=14"):
        checkpoint_filter_fn(published_weights("local_vim_tiny"), model)


# --- positions, class token, image sizes ------------------------------------------------------------------------------


def test_rotary_tables():
    tables = RotaryTables(192, 14)
    for ours, leaf in zip(tables((14, 14)), ("freqs_cos", "freqs_sin"), strict=True):
        np.testing.assert_allclose(ours[0].numpy(), fill(f"rope.{leaf}", (196, 192)), atol=1e-6)
    # rows of an 8 x 8 grid are spread over the same 14 positions
    cos, _ = RotaryTables(8, 8)((8, 8))
    torch.testing.assert_close(cos[0].unflatten(0, (8, 8))[3, 5, ::4], torch.tensor([3.0, 5.0]).mul(14 / 8).cos())


@pytest.mark.parametrize("length", [1, 4, 9])
def test_class_token_in_the_middle(length):
    patches, token = torch.randn(2, length, 3), torch.randn(2, 1, 3)
    tokens = insert_token(patches, token)
    assert torch.equal(tokens[:, length // 2], token[:, 0])
    back, taken = take_token(tokens)
    assert torch.equal(back, patches)
    assert torch.equal(taken, token)


@pytest.mark.parametrize("name", GOLDEN)
def test_image_smaller_than_a_patch(name):
    with pytest.raises(ValueError, match="7 x 64 pixels is smaller than one 16 x 16 patch"):
        small(name)(torch.randn(2, 3, 7, 64))


@pytest.mark.parametrize("size", [(16, 17), (33, 47), (64, 32), (160, 16)])
@pytest.mark.parametrize("name", GOLDEN)
def test_any_image_size(name, size):
    model = small(name)
    x = torch.randn(2, 3, *size)
    height, width = (-(-side // 16) for side in size)
    features = model.forward_features(x)
    assert features.shape == (2, height * width + (name != "local_vim_tiny"), 32)
    assert model(x).shape == (2, 5)
    padded = F.pad(x, (0, width * 16 - size[1], 0, height * 16 - size[0]))
    torch.testing.assert_close(model(padded), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_set_input_size(name):
    """Resizing the positions once gives what resizing them in every forward pass gives, and is recorded."""
    model, resized = small(name), small(name)
    resized.load_state_dict(model.state_dict())
    resized.set_input_size((40, 96))  # padded to 48 x 96
    assert resized.pos_embed.shape[1] == 18 + (model.cls_token is not None)
    assert resized._traits["img_size"] == (40, 96)
    x = torch.randn(2, 3, 40, 96)
    torch.testing.assert_close(resized(x), model(x), rtol=0, atol=0)
    same = resized.pos_embed.clone()
    resized.set_input_size((40, 96))
    assert torch.equal(resized.pos_embed, same)


def test_class_token_keeps_its_own_position():
    """The class token's row of the positions is not blended into its neighbours when the grid changes."""
    model = small("local_vim_tiny_midclstok")
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[:, 8] = 1.0
    model.set_input_size((96, 48))
    assert torch.equal(model.pos_embed[:, 9], torch.ones(1, 32))
    assert model.pos_embed.sum() == 32


def test_pooling():
    model = small("local_vim_tiny_midclstok")
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 8])
    model.reset_classifier(3, "avg")
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), patches.mean(1))
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)


def test_stream_stays_in_float32_under_autocast():
    model = small()
    dtypes = []
    for layer in model.layers:
        layer.norm.register_forward_hook(lambda m, args, out: dtypes.append(args[0].dtype))
        layer.mixer.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert dtypes == [torch.float32, torch.bfloat16] * 2
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.05 * model(x).abs().max().item())


# --- features, tracing, training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_forward_intermediates(name):
    """Features are the stream after a layer, as maps without the class token; the last one, normed, is the final feature."""
    model = small(name)
    x = torch.randn(2, 3, 48, 80)
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, args, out: streams.append(out))
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    for stream, feature in zip(streams, maps, strict=False):
        patches = stream if model.cls_token is None else take_token(stream)[0]
        assert torch.equal(feature, patches.mT.reshape(2, 32, 3, 5))
    tokens = model.forward_intermediates(x, indices=[1], output_fmt="NLC", norm=True, intermediates_only=True)[0]
    assert torch.equal(tokens, final if model.cls_token is None else take_token(final)[0])


def test_features_only():
    model = timm.create_model("local_vim_tiny", features_only=True, device="meta")
    assert model.feature_info.module_name() == ["layers.4", "layers.9", "layers.14", "layers.19"]
    assert [f.shape for f in model(torch.randn(1, 3, 64, 96, device="meta"))] == [(1, 192, 4, 6)] * 4
    assert [f.shape for f in timm.create_model("local_vim_nano", features_only=True)(torch.randn(1, 3, 32, 48))] == [
        (1, 128, 8, 12)
    ] * 4


@pytest.mark.parametrize("name", GOLDEN)
def test_fx_trace_is_bit_equal_at_any_size(name):
    model = small(name)
    traced = create_feature_extractor(
        model,
        return_nodes=[get_graph_node_names(model, _tracer())[1][-1]],
        tracer_kwargs=_tracer(),
    )
    for size in ((64, 64), (48, 80)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(next(iter(traced(x).values())), model(x))


def _tracer():
    from timm.models import get_notrace_functions, get_notrace_modules

    return {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions(), "param_shapes_constant": True}


@pytest.mark.parametrize("name", GOLDEN)
def test_compiles_as_one_graph(name):
    model = small(name, depth=1, paths=PATHS[:1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((64, 64), (48, 80)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_drop_path_grows_with_depth():
    model = timm.create_model("local_vim_tiny", drop_path_rate=0.19, device="meta")
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0.01 * i for i in range(20)])


def test_weight_decay_groups():
    """Decay for matrices, convolution kernels and nothing else."""
    model = small("local_vim_tiny_midclstok")
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())[1]["params"]}
    names = [name for name, p in model.named_parameters() if id(p) in decayed]
    assert {name.split("mixer.")[-1] for name in names} == {
        "patch_embed.proj.weight",
        "head.weight",
        "in_proj.weight",
        "out_proj.weight",
        "conv1d_weight",
        "x_proj_weight",
        "dt_projs_weight",
        "attn.global_reduce.weight",
        "attn.channel_select.weight",
    }


def test_initial_values():
    """As published: steps start at softplus(0), out_proj is scaled by the depth, A = -(1..16), D = 1."""
    model = timm.create_model("local_vim_tiny_midclstok", num_classes=10)
    mixer = model.layers[3].mixer
    assert (mixer.dt_projs_bias == 0).all()
    assert mixer.dt_projs_weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.x_proj_weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.allclose(mixer.A_logs.exp()[2, 3], torch.arange(1.0, 17.0))
    assert (mixer.Ds == 1).all()
    bound = 384**-0.5 / 20**0.5
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert 0.49 < mixer.conv1d_weight.abs().max() <= 0.5
    assert (mixer.attn.global_reduce.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.cls_token == 0).all()


@pytest.mark.parametrize("name", GOLDEN)
def test_initialisation_after_to_empty(name):
    """A model made on the meta device is complete after init_weights, rotary tables included."""
    model = small(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(tensor).all() for tensor in [*model.parameters(), *model.buffers()])
    for ours, fresh in zip(model.buffers(), small(name).buffers(), strict=True):
        assert torch.equal(ours, fresh)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"paths": PATHS[:1]}, "paths: got path names for 1 layers, expected 2"),
        ({"depth": 3}, "paths: got path names for 2 layers, expected 3"),
        ({"paths": ("h", "v")}, "paths: expected one tuple of path names for each of 2 layers"),
        ({"paths": (("h",), ("w7", "diagonal"))}, "paths: unknown path 'diagonal'"),
        ({"paths": (("h",), ())}, "paths: got no path"),
        ({"class_token": True}, "rope_grid: expected 0 with a class token"),
        ({"global_pool": "token"}, "global_pool: .* got 'token'; token needs a class token"),
        ({"global_pool": "mean"}, "global_pool: .* got 'mean'"),
        ({"embed_dim": 34}, "embed_dim: rotary positions need a multiple of 4, got 34"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_unknown_argument():
    with pytest.raises(TypeError, match="window"):
        create_model("local_vim_nano", window=7)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 32, 32), r"image: expected \(batch, 3, H, W\), got shape \(1, 4, 32, 32\)"),
        ((3, 32, 32), r"image: expected \(batch, 3, H, W\)"),
        ((1, 3, 0, 32), "0 x 32 pixels"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))


def test_bad_output_format():
    with pytest.raises(ValueError, match='output_fmt: expected "NCHW" or "NLC"'):
        small().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")
