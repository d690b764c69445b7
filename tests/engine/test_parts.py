"""Metric, optimizer groups, randomness, registry, shipped configs."""

import copy
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch.utils.data import DataLoader

from visionssm import config_path, registry
from visionssm.engine import ImageClassifier, OptimWrapperConstructor, RandomnessHook, TopK
from visionssm.engine.config import load_config
from visionssm.engine.data import IGNORED
from visionssm.errors import UserError
from visionssm.recipes import FOLDER as CONFIG_FOLDER
from visionssm.recipes import recipes

DIGITS = "classification/vmamba-nano_digits"
NANOS = ("vmamba_nano", "vim_nano", "local_vim_nano", "local_vmamba_nano")


def evaluate(scores, labels, topk=(1, 2)):
    metric = TopK(topk)
    metric.process({"labels": torch.tensor(labels)}, [{"scores": torch.tensor(row)} for row in scores])
    return metric.evaluate(len(labels))


def test_topk():
    scores = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3]]
    assert evaluate(scores, [0, 1, 2, 1]) == {"accuracy/top1": 50.0, "accuracy/top2": 75.0}


def test_topk_leaves_out_ignored_images():
    assert evaluate([[0.7, 0.3], [0.6, 0.4]], [0, IGNORED], topk=(1,)) == {"accuracy/top1": 100.0}
    with pytest.raises(UserError, match="none of the 1 images"):
        evaluate([[0.7, 0.3]], [IGNORED])


def test_topk_of_equal_scores_and_nan_is_not_perfect():
    labels = list(range(10))
    for value in (0.1, float("nan")):
        assert evaluate([[value] * 10] * 10, labels, topk=(1,)) == {"accuracy/top1": 10.0}


def test_weight_decay_groups():
    model = ImageClassifier({"model_name": "test_vit", "num_classes": 10})
    build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}})
    groups = {group["weight_decay"]: group["params"] for group in build(model).optimizer.param_groups}
    assert set(groups) == {0.0, 0.05}
    free = {id(p) for p in groups[0.0]}
    names = {name for name, p in model.named_parameters() if id(p) in free}
    assert {f"backbone.{name}" for name in model.backbone.no_weight_decay()} & set(dict(model.named_parameters())) <= names
    assert "backbone.head.bias" in names
    assert "backbone.head.weight" not in names
    assert len(groups[0.0]) + len(groups[0.05]) == len(list(model.parameters()))
    with pytest.raises(UserError, match=r"paramwise_cfg.norm_decay_mult: expected decay, no_decay, layer_decay, fallback"):
        OptimWrapperConstructor({}, {"norm_decay_mult": 0})


@pytest.mark.parametrize(
    ("given", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, None), ({"type": "RMSprop"}, None)], ids=str
)
def test_no_update_waits_for_the_device(given, fused, monkeypatch):
    """A scaled gradient may have overflowed; the fused step alone finds out on the device."""
    model = ImageClassifier({"model_name": "test_vit", "num_classes": 10})
    wrapper = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3} | given, "clip_grad": {"max_norm": 1.0}})(model)
    assert wrapper.optimizer.defaults.get("fused") is fused
    wrapper.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    read = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda value: read.append(value) or item(value))
    wrapper.update_params(loss)
    assert bool(read) is not bool(fused)
    assert any(not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    wrapper.update_params(float("inf") * model(torch.randn(2, 3, 32, 32)).square().mean())
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    assert wrapper.loss_scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("stored", [{"fused": False}, {"foreach": True}, {}], ids=str)
@pytest.mark.parametrize("own", [{"fused": False}, {}], ids=str)
def test_a_resumed_optimizer_keeps_its_own_kernels(stored, own):
    """A checkpoint of a run with others loads, also in float16, whose overflows only the fused step finds itself."""
    wrappers, models = [], []
    for given in (stored, own):
        models.append(ImageClassifier({"model_name": "test_vit", "num_classes": 10}))
        build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3} | given})
        wrappers.append(build(models[-1]))
        wrappers[-1].loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    images = torch.randn(2, 3, 32, 32)
    wrappers[0].update_params(models[0](images).square().mean())
    models[1].load_state_dict(models[0].state_dict())
    wrappers[1].load_state_dict(copy.deepcopy(wrappers[0].state_dict()))
    assert all(group["fused"] is own.get("fused", True) for group in wrappers[1].optimizer.param_groups)
    for wrapper, model in zip(wrappers, models, strict=True):
        wrapper.update_params(model(images).square().mean())
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_fallback_of_muon_is_checked():
    with pytest.raises(UserError, match=r"fallback: got '\*.head.\*', expected a tuple of patterns"):
        OptimWrapperConstructor({}, {"fallback": "*.head.*"})
    build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3}}, {"fallback": ("*.head.*",)})
    with pytest.raises(UserError, match=r"fallback: is for visionssm\.Muon, got the optimizer 'AdamW'"):
        build(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["visionssm.Muon", "Muon", "timm.optim.Muon"])
@pytest.mark.parametrize("fallback", [(), ("*.head.*",)])
def test_muon_gets_matrices_alone(kind, fallback):
    model = ImageClassifier({"model_name": "vmamba_nano", "num_classes": 10})
    optimizer = {"type": kind, "lr": 1e-3, "weight_decay": 0.05}
    wrapper = OptimWrapperConstructor({"optimizer": optimizer}, {"fallback": fallback})(model)
    groups = [group for group in wrapper.optimizer.param_groups if not group["use_muon"]]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    left = {(name.rpartition("op.")[2], decay[id(p)]) for name, p in model.named_parameters() if id(p) in decay and p.ndim > 1}
    decayed = {("x_proj_weight", 0.05), ("dt_projs_weight", 0.05)}
    decayed |= {("backbone.head.fc.weight", 0.05)} if fallback else set()
    assert left == {("A_logs", 0.0), ("Ds", 0.0), ("dt_projs_bias", 0.0)} | decayed
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    wrapper.step()
    states = {name: set(wrapper.optimizer.state[p]) for name, p in model.named_parameters()}
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert "momentum_buffer" in states["backbone.layers.0.blocks.0.op.conv2d.weight"]
    weight, A = "backbone.layers.0.blocks.0.mlp.fc1.weight", "backbone.layers.0.blocks.0.op.A_logs"
    assert "momentum_buffer" in states[weight]
    assert "exp_avg_sq" in states[A]
    # all singular values of an update are about the same, which no other optimizer here gives
    change = dict(model.named_parameters())[weight] - before[weight] * (1 - 1e-3 * 0.05)
    values = torch.linalg.svdvals(change)
    assert values.max() < 2.5 * values.min()


def test_randomness_depends_on_seed_rank_and_epoch_alone():
    def draw(seed, rank, epoch):
        torch.rand(3)
        state = {"seed": seed, "rank": rank, "epoch": epoch}
        RandomnessHook().before_train_epoch(SimpleNamespace(**state, train_dataloader=DataLoader([0]), train_loop=None))
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw(1, 0, 2) == draw(1, 0, 2)
    draws = [draw(*key) for key in ((1, 0, 2), (2, 0, 2), (1, 1, 2), (1, 0, 3))]
    assert len(set(draws)) == 4
    assert all(len({d[generator] for d in draws}) == 4 for generator in range(3))


def test_classifier_modes():
    model = ImageClassifier({"model_name": "test_resnet", "num_classes": 10}).eval()
    batch = {"images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "labels": torch.tensor([1, 2])}
    data = model.data_preprocessor(batch)
    mean, std = (torch.tensor(model.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(data["images"], (batch["images"] / 255 - mean) / std)
    logits = model(data["images"])
    assert logits.shape == (2, 10)
    losses = model(**data, mode="loss")
    torch.testing.assert_close(losses["loss"], torch.nn.functional.cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(model(**data, mode="predict")[1]["scores"], logits[1].softmax(0))
    with pytest.raises(ValueError, match="mode: got 'predic'"):
        model(**data, mode="predic")


def test_init_weights_keeps_the_weights():
    model = ImageClassifier({"model_name": "test_vit", "num_classes": 10})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_types_resolve_from_the_root_registries_alone():
    code = (
        "import sys; from mmengine.registry import MODELS; "
        "assert MODELS.get('visionssm.ImageClassifier').__module__ == 'visionssm.engine.classifier'; "
        "assert not {'mmdet', 'mmseg', 'mmcv'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for root, name in ((DATASETS, "Digits"), (METRICS, "TopK"), (HOOKS, "ProgressHook")):
        assert root.get(f"visionssm.{name}") is not None
    assert OPTIM_WRAPPER_CONSTRUCTORS.get("visionssm.OptimWrapperConstructor") is OptimWrapperConstructor
    assert MODELS.get("visionssm.ImageClassifier") is ImageClassifier


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["mmengine", "onedl-mmengine"], "mmengine and onedl-mmengine share one import folder: pip uninstall"),
        ([], "training needs mmengine"),
    ],
)
def test_engine_distributions(found, message, monkeypatch):
    monkeypatch.setattr(registry, "_installed", found.__contains__)
    with pytest.raises(ImportError, match=message):
        registry.check_engine()


def test_config_names():
    assert config_path(DIGITS) == config_path(f"{DIGITS}.py")
    assert config_path(DIGITS) == config_path("vmamba-nano_digits") == config_path("vmamba-nano_digits.py")
    assert config_path(DIGITS) in recipes()


def test_every_config_folder_is_a_package():
    """A wheel ships packages: without its `__init__.py` a folder of recipes stays behind."""
    folders = {path.parent for path in CONFIG_FOLDER.rglob("*.py")}
    assert len(folders) >= 4
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", [p for p in recipes() if p.parent.name == "classification"], ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    """Those of detectors and segmentors stand on mmdet's and mmseg's: tests/openmmlab builds them."""
    load_config(str(path))


@pytest.mark.parametrize("name", NANOS)
def test_digits_config_builds_every_nano(name):
    cfg = load_config(DIGITS, {"model.backbone.model_name": name})
    model = MODELS.build(cfg.model)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    losses = model(torch.randn(2, 3, 32, 32), torch.tensor([3, 4]), mode="loss")
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert timm.is_model(name)
