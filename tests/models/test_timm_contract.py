"""timm's contract, without timm's own test file and without a download.

Names, shapes, dtypes and devices are checked for every registered model on the meta device; numbers on a small model per family.
"""

import copy
import functools
import importlib
import inspect
import pickle

import pytest
import timm
import torch
from timm.models import get_model_input_config, get_notrace_functions, get_notrace_modules, group_parameters
from timm.models._hub import save_config_for_hf, save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import visionssm  # noqa: F401

NAMES = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("visionssm.")]
CLASS_TOKEN = {"class_token": True, "global_pool": "token", "rope_grid": 0}
NANOS = [pytest.param(name, {}, id=name) for name in NAMES if name.endswith("_nano")]
NANOS.append(pytest.param("local_vim_nano", CLASS_TOKEN, id="local_vim_nano-class_token"))
MAPS = [nano for nano in NANOS if timm.get_pretrained_cfg_value(nano.values[0], "pool_size")]
TOKENS = [nano for nano in NANOS if nano not in MAPS]
nanos = pytest.mark.parametrize(("name", "kwargs"), NANOS)


@functools.cache
def meta_model(name):
    """Shared between tests: copy it before changing it."""
    return timm.create_model(name, device="meta")


def nano(name, kwargs, **more):
    torch.manual_seed(1)
    return timm.create_model(name, **({"num_classes": 5} | kwargs | more)).eval()


def image(model, *size, batch=2):
    channels, height, width = model.pretrained_cfg["input_size"]
    return torch.randn(batch, getattr(model, "in_chans", channels), *(size or (height, width)))


def is_map(model):
    return getattr(model, "output_fmt", "NLC") == "NHWC"


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_family_has_a_nano():
    families = {timm.model_entrypoint(name).__module__ for name in NAMES}
    assert families == {timm.model_entrypoint(nano.values[0]).__module__ for nano in NANOS}


# --- structure, every model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_config(name):
    model = meta_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"][0] == model.in_chans
    assert model.num_classes == cfg["num_classes"] == (10 if cfg.get("tag") == "cifar10" else 1000)  # no weights, no tag
    assert model.get_parameter(cfg["first_conv"] + ".weight").shape[1] == model.in_chans
    classifier = model.get_parameter(cfg["classifier"] + ".weight")
    assert classifier is model.get_classifier().weight
    assert classifier.shape == (model.num_classes, model.head_hidden_size)
    assert len(model.feature_info) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name):
    model = copy.deepcopy(meta_model(name))
    x = image(model).to("meta")
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    if is_map(model):
        assert features.shape[1:-1] == model.pretrained_cfg["pool_size"]
    else:
        assert features.dim() == 3
    assert model.forward_head(features).shape == (2, model.num_classes)
    pooled = model.forward_head(features, pre_logits=True).shape
    assert pooled == (2, model.head_hidden_size)

    model.to(torch.bfloat16)  # after a forward: nothing may be cached in the old dtype
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model.forward_head(features.bfloat16()).shape == pooled
    model.reset_classifier(0, "")
    assert model.forward_head(features.bfloat16()).shape == features.shape


@pytest.mark.parametrize("name", NAMES)
def test_factory_arguments(name):
    model = timm.create_model(name, num_classes=0, global_pool="", device="meta", dtype=torch.float64)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not [n for n, t in tensors.items() if not t.is_meta]
    assert not [n for n, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float64]
    x = image(model, 64, 96, batch=1).to("meta", torch.float64)
    output = model(x)
    assert output.shape[-1] == model.num_features == model.head_hidden_size
    assert output.dim() == (4 if is_map(model) else 3)
    assert output.dtype == torch.float64
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = meta_model(name)
    names = [n for n, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    decayed = [n for n, p in model.named_parameters() if p.dim() > 1 and n not in model.no_weight_decay()]
    assert not [n for n in decayed if n.endswith(("A_logs", "Ds", "bias", "pos_embed", "cls_token"))]
    for coarse in (False, True):
        layer_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        layers = [layer_of[n] for n in names]
        assert layers == sorted(layers), "from the stem to the head"
        assert len(set(layers)) > len(model.feature_info)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.75)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(names)
    no_decay = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(model.get_parameter(n)) in no_decay for n in model.no_weight_decay())


@pytest.mark.parametrize("name", NAMES)
def test_reset_keeps_dtype_device_mode_and_frozen_parameters(name):
    model = copy.deepcopy(meta_model(name)).to(torch.float64)
    for training in (False, True):
        model.train(training)
        model.reset_classifier(0)
        model.reset_classifier(2)
        assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
        assert {module.training for module in model.modules()} == {training}
    model.requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(64, 96))
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_configuration_can_be_exported(name, tmp_path):
    save_config_for_hf(meta_model(name), tmp_path / "config.json")
    rebuilt = timm.create_model(f"local-dir:{tmp_path}", device="meta")
    assert rebuilt.state_dict().keys() == meta_model(name).state_dict().keys()


# --- numbers, a small model of every family -----------------------------------------------------------------------------


@nanos
def test_forward_backward_and_grad_checkpointing(name, kwargs):
    model = nano(name, kwargs).train()
    x = image(model)
    kept, outputs, gradients = [], [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t):
            outputs.append(model(x))
        outputs[-1].square().sum().backward()
        kept.append(sum(sizes))
        gradients.append(grads(model))
    assert outputs[0].shape == (2, 5)
    assert outputs[0].isfinite().all()
    assert not [n for n, g in gradients[0].items() if g is None or not g.isfinite().all() or not g.any()]
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@nanos
@torch.no_grad()
def test_any_size_and_batch(name, kwargs):
    model = nano(name, kwargs)
    for size in ((33, 47), (40, 64), (70, 17)):
        x = image(model, *size, batch=3)
        output = model(x)
        assert output.shape == (3, 5)
        assert output.isfinite().all()
        torch.testing.assert_close(model(x[1:2]), output[1:2], rtol=1e-4, atol=1e-5)


@nanos
@torch.no_grad()
def test_features_only(name, kwargs):
    model = nano(name, kwargs)
    x = image(model, 48, 80)
    everything = model.forward_intermediates(x, intermediates_only=True)
    for more, count in (({}, None), ({"out_indices": (0, 2)}, 2), ({"out_indices": 2}, 2)):
        extractor = nano(name, kwargs, features_only=True, **more)
        info = extractor.feature_info
        features = extractor(x)
        assert len(features) >= 3 if count is None else len(features) == count
        assert [f.shape for f in features] == [
            (2, channels, 48 // stride, 80 // stride) for channels, stride in zip(info.channels(), info.reduction(), strict=True)
        ]
        levels = [everything[i] for i in info.out_indices]
        torch.testing.assert_close(features, levels)


@pytest.mark.parametrize(("name", "kwargs"), MAPS)
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
@torch.no_grad()
def test_other_feature_extractors_of_a_hierarchy(name, kwargs, feature_cls):
    extractor = nano(name, kwargs, features_only=True, feature_cls=feature_cls)
    model = nano(name, kwargs)
    x = image(model)
    features = extractor(x)
    features = list(features.values()) if isinstance(features, dict) else features
    torch.testing.assert_close(features, model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True))


@nanos
@torch.no_grad()
def test_forward_intermediates(name, kwargs):
    model = nano(name, kwargs)
    last = len(model.feature_info) - 1
    x = image(model, 48, 64)
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_head(final), model(x), rtol=0, atol=0)
    assert [f.shape for f in features] == [
        (2, info["num_chs"], 48 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info
    ]

    plain_format = "NHWC" if is_map(model) else "NLC"
    plain = model.forward_intermediates(x, output_fmt=plain_format, intermediates_only=True)
    flat = [f.permute(0, 2, 3, 1) if is_map(model) else f.flatten(2).mT for f in features]
    torch.testing.assert_close(plain, flat, rtol=0, atol=0)

    normed = model.forward_intermediates(x, norm=True, output_fmt=plain_format, intermediates_only=True)
    if final.shape == normed[-1].shape:
        torch.testing.assert_close(normed[-1], final, rtol=0, atol=0)
    else:  # without the class token, which is in the middle of the sequence
        middle = final.shape[1] // 2
        torch.testing.assert_close(normed[-1], torch.cat([final[:, :middle], final[:, middle + 1 :]], 1), rtol=0, atol=0)

    for indices in ([1], [0, 2], [-1], 2):
        taken = [indices] if isinstance(indices, int) else indices
        taken = [last - 1, last] if indices == 2 else taken
        for stop_early in (False, True):
            got = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            torch.testing.assert_close(got, [features[i] for i in taken], rtol=0, atol=0)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], final)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NWHC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[last + 1])


@nanos
@pytest.mark.parametrize("level", ["first", "middle", "last"])
def test_prune_intermediate_layers(name, kwargs, level):
    model = nano(name, kwargs, drop_rate=0.5)
    last = len(model.feature_info) - 1
    index = {"first": 0, "middle": last // 2, "last": last}[level]
    x = image(model)
    with torch.no_grad():
        expected = model(x)
        tap = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    for prune_norm in (False, True):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([index], prune_norm=prune_norm)
        with torch.no_grad():
            features = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
            torch.testing.assert_close(features[0], tap, rtol=0, atol=0)
            assert torch.equal(pruned(x), pruned(x))  # no dropout has come to life
        if prune_norm:
            final = pruned.forward_features(x)
            if final.dim() == 4:
                torch.testing.assert_close(final.permute(0, 3, 1, 2), tap, rtol=0, atol=0)
        features = pruned.train().forward_intermediates(x, indices=taken, norm=not prune_norm, intermediates_only=True)
        features[0].square().sum().backward()
        unused = [n for n, g in grads(pruned).items() if g is None]
        assert unused == []

    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(pruned(x), expected, rtol=0, atol=0)


@nanos
@torch.no_grad()
def test_head_width(name, kwargs):
    """`head_hidden_size` is what the head's input has, whatever the pooling and after pruning."""
    model = nano(name, kwargs, num_classes=0, global_pool="avg")
    x = image(model)

    def check(num_classes):
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(x).shape == (2, num_classes or model.head_hidden_size)

    check(0)
    for pool in ("max", "avgmax", "catavgmax"):
        if is_map(model) or (pool == "max" and name == "vim_nano"):
            model.reset_classifier(7, pool)
            check(7)
    level = len(model.feature_info) - 2
    model.prune_intermediate_layers([level], prune_norm=True)
    model.reset_classifier(7, "avg")
    assert model.head_hidden_size == model.feature_info[level]["num_chs"]
    check(7)


@nanos
@torch.no_grad()
def test_pooling(name, kwargs):
    assert inspect.signature(nano(name, kwargs).reset_classifier).parameters["global_pool"].default is None
    model = nano(name, kwargs, global_pool="avg")
    x = image(model)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled, rtol=0, atol=0)
    patches = features.flatten(1, -2)
    if name == "vim_nano" or kwargs == CLASS_TOKEN:
        middle = patches.shape[1] // 2
        model.reset_classifier(3, "token")
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), patches[:, middle])
        patches = torch.cat([patches[:, :middle], patches[:, middle + 1 :]], dim=1)
    torch.testing.assert_close(pooled, patches.mean(1))
    for make in (lambda: model.reset_classifier(3, "mean"), lambda: nano(name, kwargs, global_pool="mean")):
        with pytest.raises((ValueError, AssertionError), match="pool"):
            make()


@nanos
def test_features_only_with_grad_checkpointing(name, kwargs):
    """How detectors train: the gradients are those without checkpointing."""
    gradients = []
    for enable in (False, True):
        model = nano(name, kwargs, features_only=True).train()
        model.model.set_grad_checkpointing(enable)  # of the model inside the extractor
        torch.manual_seed(2)
        sum(f.square().mean() for f in model(image(model))).backward()
        gradients.append(grads(model))
    assert not [n for n, g in gradients[0].items() if g is None]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("name", "kwargs"), TOKENS)
@torch.no_grad()
def test_set_input_size(name, kwargs):
    model = nano(name, kwargs)
    before = model.pos_embed
    model.set_input_size(img_size=(32, 32))
    model.set_input_size()
    assert model.pos_embed is before  # an optimizer may hold it
    x = image(model, 48, 80)
    output = model(x)
    model.set_input_size(img_size=(48, 80))
    assert model.pos_embed.shape != before.shape
    torch.testing.assert_close(model(x), output)
    assert get_model_input_config(model)["input_size"] == (3, 48, 80)

    resized = nano(name, kwargs, img_size=(48, 80))
    resized.load_state_dict(model.state_dict())
    torch.testing.assert_close(resized(x), output)
    model.to(torch.bfloat16).set_input_size(img_size=64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for make in (lambda: model.set_input_size(img_size=0), lambda: nano(name, kwargs, img_size=(0, 32))):
        with pytest.raises(ValueError, match="img_size: "):
            make()


@nanos
@torch.no_grad()
def test_bfloat16_after_a_forward(name, kwargs):
    model = nano(name, kwargs)
    x = image(model)
    expected = model(x)
    output = model.to(torch.bfloat16)(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@nanos
def test_fx_trace_is_bit_equal(name, kwargs):
    model = nano(name, kwargs).train()
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=tracer
    )
    x = image(model)
    with torch.inference_mode():
        assert torch.equal(*traced.eval()(x).values(), model.eval()(x))
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}
    outputs, gradients = [], []
    for forward in (model.train(), lambda x: next(iter(traced.train()(x).values()))):
        model.zero_grad()
        outputs.append(forward(x))
        outputs[-1].square().sum().backward()
        gradients.append(grads(model))
    assert torch.equal(*outputs)
    assert [n for n, g in gradients[0].items() if not torch.equal(g, gradients[1][n])] == []


@nanos
@torch.no_grad()
def test_pretrained_file_with_other_channels_and_classes(name, kwargs, tmp_path):
    source = nano(name, kwargs, num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load = functools.partial(
        timm.create_model, name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}, **kwargs
    )
    first_conv = source.pretrained_cfg["first_conv"] + ".weight"
    for num_classes in (7, 0):
        model = load(in_chans=1, num_classes=num_classes).eval()
        assert model(image(model)).shape == (2, num_classes or model.num_features)
        state = model.state_dict()
        torch.testing.assert_close(state.pop(first_conv), source.state_dict()[first_conv].sum(1, keepdim=True))
        head = source.pretrained_cfg["classifier"]
        assert not [n for n, t in state.items() if not n.startswith(head) and not torch.equal(t, source.state_dict()[n])]
    x = image(source)
    features = load(features_only=True, out_indices=(0, 1)).eval()(x)
    torch.testing.assert_close(features, source.forward_intermediates(x, indices=[0, 1], intermediates_only=True))


@nanos
@torch.no_grad()
def test_local_dir_round_trip(name, kwargs, tmp_path):
    """What `save_for_hf` writes, `local-dir:` reads, also after the model was adapted."""
    source = nano(name, kwargs, in_chans=4, num_classes=11)
    if hasattr(source, "set_input_size"):
        source.set_input_size(img_size=(48, 64))
    source.reset_classifier(7)
    save_for_hf(source, tmp_path, safe_serialization=True, data_config={"mean": (0.5,) * 4, "std": (0.5,) * 4})
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(source, 48, 64)
    assert restored.in_chans == 4
    assert torch.equal(restored(x), source(x))
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert restored(x[:, :1]).shape == (2, 3)


@nanos
@torch.no_grad()
def test_copies(name, kwargs, tmp_path):
    model = nano(name, kwargs)
    x = image(model)
    expected = model(x)  # first: a copy must carry no state of a forward
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = timm.create_model(name, num_classes=5, **kwargs).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    assert torch.equal(other(x), expected)


@nanos
@torch.no_grad()
def test_memory_given_after_construction(name, kwargs):
    """A model made on the meta device: weights from `init_weights`, or loaded with the buffers computed anew."""
    source = nano(name, kwargs, dtype=torch.float64)
    x = image(source).double()
    for loaded in (False, True):
        model = nano(name, kwargs, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
        if loaded:
            model.load_state_dict(source.state_dict())
            reinit_non_persistent_buffers(model)
            assert torch.equal(model(x), source(x))
        else:
            model.init_weights()
            assert not [n for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.isfinite().all()]
            assert model(x).isfinite().all()


@nanos
def test_filter_keeps_a_headless_state_dict_in_any_order(name, kwargs):
    model = nano(name, kwargs, num_classes=0)
    filter_fn = importlib.import_module(type(model).__module__).checkpoint_filter_fn
    own = dict(sorted(model.state_dict().items()))
    filtered = filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(torch.equal(filtered[key], value) for key, value in own.items())


@nanos
@torch.no_grad()
def test_dropout_and_stochastic_depth(name, kwargs):
    for option in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model = nano(name, kwargs, **option)
        x = image(model, batch=4)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
