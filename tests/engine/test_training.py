"""What training promises beyond running: resuming after a kill, averages, precision, the backbone alone compiled, messages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.runner import Runner as MMEngineRunner
from torch import nn

from visionssm import config_path
from visionssm.cli import main
from visionssm.engine import EMAHook, ImageClassifier, ImagePreprocessor, OptimWrapperConstructor, Runner, RuntimeInfoHook
from visionssm.engine.config import load_config
from visionssm.engine.launch import _use_amp, main_test, main_train
from visionssm.engine.learning_curve import read_logs
from visionssm.engine.optim import OptimWrapper
from visionssm.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
KILL = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Kill(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""
RANDOM = """
_base_ = {base!r}
model = dict(
    backbone=dict(model_name="test_vit", img_size=32, drop_path_rate=0.3),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    random_erasing=dict(probability=0.5, mode="pixel"),
)
augmentation = dict(auto_augment="rand-m9-mstd0.5-inc1", scale=(0.3, 1.0))
train_cfg = dict(max_epochs=2, val_interval=1)
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    num_batch_per_epoch=4,
    dataset=dict(transform=augmentation),
    worker_init_fn=dict(type="visionssm.init_worker"),
)
val_dataloader = dict(num_batch_per_epoch=1)
test_dataloader = dict(num_batch_per_epoch=1)
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.5),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
"""


@pytest.fixture
def random_config(tmp_path):
    """A config with everything that draws random numbers."""
    config = tmp_path / "noisy.py"
    config.write_text(RANDOM.format(base=str(config_path("classification/vmamba-nano_digits"))))
    return config


def load(checkpoint):
    return torch.load(checkpoint, weights_only=False)  # the file was written by this test


def one_line(err):
    (line,) = err.strip().splitlines()
    return line


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_killed_in_the_middle_of_an_epoch_and_resumed(random_config, tmp_path, capsys):
    """The weights, the averaged weights and the optimizer end bit by bit where they end without the kill."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (tmp_path / "kill.py").write_text(KILL)
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "_base_ = 'noisy.py'\ncustom_imports = dict(imports=['kill'])\ndefault_hooks = dict(kill=dict(type='Kill'))\n"
    )
    command = [sys.executable, str(TOOLS / "train.py"), str(deadly), "--work-dir", str(killed)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [file.name for file in killed.glob("*.pth*")] == ["epoch_1.pth"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main_train([str(random_config), "--work-dir", str(killed), "--resume"]) == 0
        assert main_train([str(random_config), "--work-dir", str(whole)]) == 0
    finally:
        torch.set_num_threads(threads)
    expected, got = load(whole / "epoch_2.pth"), load(killed / "epoch_2.pth")
    for entry in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(got[entry][name], value) for name, value in expected[entry].items())
    for number, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(got["optimizer"]["state"][number][name], value) for name, value in state.items())
    averaged, trained = expected["state_dict"], expected["ema_state_dict"]
    assert any(not torch.equal(trained[f"module.{name}"], value) for name, value in averaged.items())

    # what was exported and tested is the average
    exported = timm.create_model(f"local-dir:{whole / 'timm'}", pretrained=True).state_dict()
    assert all(torch.equal(exported[name], expected["state_dict"][f"backbone.{name}"]) for name in exported)
    result = [line for line in capsys.readouterr().out.splitlines() if line.startswith("top-1")][-1]
    assert main_test([str(random_config), str(whole / "epoch_2.pth"), "--work-dir", str(tmp_path / "test")]) == 0
    assert result in capsys.readouterr().out

    # logs and the picture
    (log,) = whole.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["iter"] for row in rows if "loss" in row] == list(range(1, 9))
    assert {"loss", "accuracy", "lr", "grad_norm", "time"} <= set(rows[0])
    assert list(whole.glob("*/vis_data/events.out.tfevents*"))
    assert (killed / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_where_accumulated_batches_do_not_divide_an_epoch(tiny, capsys):
    """Four batches and three an update: the one that is left is an update of its own, and no gradient crosses a checkpoint."""
    config, work = tiny
    options = ["--cfg-options", "optim_wrapper.accumulative_counts=3"]
    assert main_train([str(config), "--work-dir", str(work), *options]) == 0
    expected = load(work / "epoch_2.pth")
    assert {int(state["step"]) for state in expected["optimizer"]["state"].values()} == {4}
    (work / "epoch_2.pth").unlink()
    assert main_train([str(config), "--work-dir", str(work), "--resume", *options]) == 0
    got = load(work / "epoch_2.pth")["state_dict"]
    assert all(torch.equal(got[name], value) for name, value in expected["state_dict"].items())
    assert "Resumed iteration number" not in capsys.readouterr().err


def test_runs_of_one_second_have_a_log_each(tiny, monkeypatch):
    path, work = tiny
    monkeypatch.setattr("mmengine.runner.runner.time.strftime", lambda *_: "20261201_021307")
    options = ["--cfg-options", "train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
    for name in ("first", "second"):
        assert main_train([str(path), "--work-dir", str(work / name), *options]) == 0
    first, second = ((work / name / "20261201_021307" / "20261201_021307.log").read_text() for name in ("first", "second"))
    assert first.count("Epoch(train) [1][1/4]") == second.count("Epoch(train) [1][1/4]") == 1


def test_what_is_tested_after_training_is_the_average(tiny):
    """mmengine begins the test as a run of its own, at which its hook would begin a new average."""
    path, work = tiny
    cfg = load_config(str(path))
    cfg.work_dir = str(work)
    cfg.custom_hooks = [{"type": "visionssm.EMAHook", "decay": 0.5}]
    runner = Runner.from_cfg(cfg)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    averaged, trained = (
        torch.cat([p.detach().flatten() for p in model.parameters()]).clone() for model in (hook.ema_model.module, runner.model)
    )
    assert not torch.equal(averaged, trained)
    seen = []
    runner.model.backbone.register_forward_pre_hook(
        lambda module, _: seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    )
    runner.test()
    assert seen
    assert all(torch.equal(weights, averaged) for weights in seen)


def test_both_models_are_validated(tiny):
    """The figures of both, each from a run without the other's."""
    path, work = tiny
    rows = {}
    for name, hooks in (
        ("both", [{"type": "visionssm.EMAHook", "decay": 0.9, "validate_both": True}]),
        ("average", [{"type": "visionssm.EMAHook", "decay": 0.9}]),
        ("trained", []),
    ):
        cfg = load_config(str(path), {"val_dataloader.num_batch_per_epoch": 3})
        cfg.work_dir, cfg.custom_hooks, cfg.experiment_name = str(work / name), hooks, name
        Runner.from_cfg(cfg).train()
        (log,) = (work / name).glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        rows[name] = {key: [line[key] for line in lines if key in line] for key in ("accuracy/top1", "accuracy/top1_trained")}
    assert rows["both"]["accuracy/top1"] == rows["average"]["accuracy/top1"]
    assert rows["both"]["accuracy/top1_trained"] == rows["trained"]["accuracy/top1"]
    assert rows["trained"]["accuracy/top1"] != rows["average"]["accuracy/top1"]


def test_moving_average_counts_updates(tiny):
    """By hand: SGD without momentum, so that the weights after each update follow from the gradients."""
    model = nn.Linear(1, 1, bias=False)
    hook = EMAHook(decay=0.9)
    hook.before_run(Namespace(model=model))
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5), accumulative_counts=2)
    values = []
    for _ in range(6):
        with wrapper.optim_context(model):
            loss = model(torch.ones(1, 1)).sum()
        wrapper.update_params(loss)
        hook.after_train_iter(Namespace(optim_wrapper=wrapper, iter=0, epoch=0), 0)
        values.append(model.weight.item())
    first, second, third = values[1], values[3], values[5]
    assert values[0] != first == values[2] != second == values[4] != third
    expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
    assert hook.ema_model.module.weight.item() == pytest.approx(expected)


class OnDevice(torch.Tensor):
    """A value that says it is elsewhere, and counts how often it is read."""

    reads = 0

    @property
    def device(self):
        return torch.device("meta")

    def tolist(self):
        OnDevice.reads += 1
        return super().tolist()

    def item(self):
        OnDevice.reads += 1
        return super().item()


def test_losses_are_read_once_in_an_interval(monkeypatch):
    monkeypatch.setattr(OnDevice, "reads", 0)
    hook, seen = RuntimeInfoHook(), []
    hook.interval = 5
    hub = Namespace(update_scalar=lambda name, value: seen.append(value))
    runner = Namespace(message_hub=hub, optim_wrapper=None, train_dataloader=range(12), iter=0)
    for batch_idx in range(12):
        loss = torch.tensor(float(batch_idx)).as_subclass(OnDevice)
        runner.iter = batch_idx
        hook.after_train_iter(runner, batch_idx, outputs={"loss": loss})
        assert len(seen) == (batch_idx + 1) // 5 * 5 if batch_idx < 11 else 12
    assert seen == list(range(12))
    assert OnDevice.reads == 3
    hook.pending = [{"loss": torch.tensor(value)} for value in (1.0, float("nan"), 2.0)]
    with pytest.raises(UserError, match="the loss is nan in iteration 11:"):
        hook.flush(runner)


class Namespace:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize("name", ["vim_nano", "vmamba_nano", "local_vim_nano", "local_vmamba_nano"])
def test_bfloat16_trains_the_nanos_on_a_cpu(name):
    torch.manual_seed(0)
    model = ImageClassifier({"model_name": name, "num_classes": 10})
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), dtype="bfloat16", clip_grad={"max_norm": 5.0})
    batch = {"images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "labels": torch.arange(4)}
    losses = [model.train_step(batch, wrapper)["loss"].item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert torch.isfinite(wrapper.grad_norm)
    with wrapper.optim_context(model):
        assert model.backbone(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_amp_option_and_a_wrong_precision(tiny, capsys):
    config, work = tiny
    options = ["train_cfg.max_epochs=1", "val_cfg.fp16=True", "test_cfg.fp16=True"]
    assert main_train([str(config), "--work-dir", str(work), "--amp", "--cfg-options", *options]) == 0
    assert "dtype='bfloat16'" in next(work.glob("*.py")).read_text()
    capsys.readouterr()
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", "optim_wrapper.dtype=float61"]) == 1
    message = one_line(capsys.readouterr().err)
    assert "optim_wrapper.dtype: got 'float61', expected one of float16, bfloat16; did you mean float16" in message


def test_layer_decay_follows_the_group_matcher():
    model = ImageClassifier({"model_name": "vim_nano", "num_classes": 10})
    build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}, {"layer_decay": 0.5})
    rate = {id(p): group["lr"] for group in build(model).optimizer.param_groups for p in group["params"]}
    backbone = model.backbone
    depth = len(backbone.layers)
    assert {rate[id(p)] for p in backbone.head.parameters()} == {1.0}
    for index, layer in enumerate(backbone.layers):
        assert {rate[id(p)] for p in layer.parameters()} == {0.5 ** (depth - index)}
    assert rate[id(backbone.pos_embed)] == rate[id(backbone.patch_embed.proj.weight)] == 0.5 ** (depth + 1)


@pytest.mark.parametrize(
    ("flags", "mode"), [(["--compile"], "default"), (["--compile-mode", "reduce-overhead"], "reduce-overhead")]
)
def test_only_the_backbone_is_compiled(tiny, monkeypatch, capsys, flags, mode):
    config, work = tiny
    compiled = []
    compile_eagerly = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **options: compile_eagerly(model, backend="eager", **options))
    original = nn.Module.compile

    def recorded(self, *args, **kwargs):
        compiled.append((type(self).__name__, kwargs))
        original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", recorded)
    options = ["train_cfg.max_epochs=1", "train_dataloader.num_batch_per_epoch=1", "model.backbone.model_name=test_mambaout"]
    assert main_train([str(config), "--work-dir", str(work), *flags, "--cfg-options", *options]) == 0
    assert compiled == [("MambaOut", {"mode": mode})]
    assert set(load(work / "epoch_1.pth")["state_dict"]) == {
        f"backbone.{name}" for name in timm.create_model("test_mambaout", num_classes=10).state_dict()
    }


def test_flip_test_averages_an_image_and_its_mirror_image():
    model = ImageClassifier({"model_name": "test_vit", "num_classes": 10, "img_size": 32}, flip_test=True).eval()
    images = torch.randn(2, 3, 32, 32)
    scores = torch.stack([row["scores"] for row in model(images, mode="predict")])
    expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, model(images).softmax(1))


def test_mixed_targets_and_erased_pixels():
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    model = ImageClassifier(
        {"model_name": "test_vit", "num_classes": 10, "img_size": 32}, 0.1, mixing, {"probability": 1.0, "mode": "pixel"}
    )
    batch = {"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "labels": torch.arange(4)}
    data = model.data_preprocessor(batch, training=True)
    assert data["labels"].shape == (4, 10)
    torch.testing.assert_close(data["labels"].sum(1), torch.ones(4))
    assert data["labels"].min().item() == pytest.approx(0.01)
    assert data["images"].flatten(1).std(1).min() > 0.05  # erased with noise
    loss = model(**data, mode="loss")["loss"]
    expected = -(data["labels"] * model(data["images"]).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    plain = model.data_preprocessor(batch)
    assert torch.equal(plain["labels"], batch["labels"])
    assert isinstance(model.data_preprocessor, ImagePreprocessor)
    assert plain["images"].flatten(2).std(2).max() == 0


def test_initial_weights_of_another_stride(tmp_path):
    source = ImageClassifier({"model_name": "vim_nano", "num_classes": 10})
    file = tmp_path / "epoch_300.pth"
    torch.save({"state_dict": source.state_dict(), "meta": {}}, file)
    finer = {"model_name": "vim_nano", "num_classes": 10, "img_size": 48}
    model = ImageClassifier(finer, initial_weights=str(file))
    assert not torch.equal(model.backbone.head.weight, source.backbone.head.weight)
    model.init_weights()
    assert torch.equal(model.backbone.head.weight, source.backbone.head.weight)
    assert model.backbone.pos_embed.shape != source.backbone.pos_embed.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["train_dataloader.batch_size=15", "model.mixup.mixup_alpha=0.8"],
            "batch_size: got 15, expected an even number, as mixup pairs",
        ),
        (["model.mixup.mixup_alfa=0.8"], "model.mixup.mixup_alfa: timm's Mixup has no such argument; did you mean mixup_alpha"),
        (
            ["model.random_erasing.probabilty=0.8"],
            "model.random_erasing.probabilty: .* no such argument; did you mean prob",
        ),
        (["train_dataloader.num_workers=1", "train_dataloader.persistent_workers=True"], "persistent_workers: expected False"),
        (["model.initial_weights=vim_tinny.in1k"], "no published checkpoint is called 'vim_tinny.in1k'"),
        (["optim_wrapper.optimizer.type=AdmW"], "optimizer.type: unknown type 'AdmW'; did you mean AdamW"),
        (["optim_wrapper.optimizer.type=timm.optm.Muon"], "unknown type 'timm.optm.Muon'; did you mean timm.optim.Muon"),
        (["optim_wrapper.optimizer.type=timm.optim.Moun"], "unknown type 'timm.optim.Moun'; did you mean timm.optim.Muon"),
        (["optim_wrapper.optimizer.type=torch.optim.Muon"], "type: torch's Muon takes matrices alone; expected 'visionssm.Muon'"),
        (
            ["optim_wrapper.paramwise_cfg.layer_decai=0.8"],
            "paramwise_cfg.layer_decai: expected decay, no_decay, layer_decay.*did you mean layer_decay",
        ),
        (
            ["optim_wrapper.accumulate=2"],
            "optim_wrapper.accumulate: visionssm.OptimWrapper has no such argument; did you mean accumulative",
        ),
        (["optim_wrapper.optimizer.lr=1e30"], "the loss is (nan|inf) in iteration [23]: lower optim_wrapper.optimizer.lr"),
        (["train_cfg.max_epochs"], "--cfg-options: got 'train_cfg.max_epochs', expected KEY=VALUE"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, tiny, capsys):
    config, work = tiny
    if any("model." in option or "paramwise" in option for option in options):
        config.write_text(
            config.read_text() + "model['mixup'] = {}\nmodel['random_erasing'] = {}\noptim_wrapper = dict(paramwise_cfg={})\n"
        )
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", *options]) == 1
    assert re.search(message, one_line(capsys.readouterr().err))


def test_an_odd_last_batch_cannot_be_mixed(tiny, capsys):
    config, work = tiny
    config.write_text(
        config.read_text() + "model['mixup'] = dict(mixup_alpha=1.0)\ntrain_dataloader['num_batch_per_epoch'] = None\n"
    )
    assert main_train([str(config), "--work-dir", str(work)]) == 1  # 1,437 images
    assert "train_dataloader.drop_last: expected True with mixup, as the last batch has an odd 13 images" in one_line(
        capsys.readouterr().err
    )


def test_an_epoch_without_a_whole_batch(tiny, capsys):
    config, work = tiny
    config.write_text(config.read_text() + "train_dataloader = dict(batch_size=2000, drop_last=True)\n")
    assert main_train([str(config), "--work-dir", str(work)]) == 1
    message = "batch_size: got 2000, with drop_last, but an epoch has 1437 images for this process"
    assert message in one_line(capsys.readouterr().err)


def test_out_of_memory_says_what_to_lower(tiny, monkeypatch, capsys):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the manual")

    config, work = tiny
    monkeypatch.setattr(ImageClassifier, "forward", exhausted)
    assert main_train([str(config), "--work-dir", str(work)]) == 1
    message = one_line(capsys.readouterr().err)
    assert "lower train_dataloader.batch_size and raise optim_wrapper.accumulative_counts by the same factor" in message
    assert "Tried to allocate 20.00 GiB" in message


def test_resume_from_a_checkpoint_of_another_model(tiny, capsys):
    config, work = tiny
    main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"])
    capsys.readouterr()
    options = ["model.backbone.model_name=test_vit", "model.backbone.img_size=32"]
    assert main_train([str(config), "--work-dir", str(work), "--resume", "--cfg-options", *options]) == 1
    assert "epoch_1.pth is not of this model: " in one_line(capsys.readouterr().err)


def test_resume_with_other_batches(tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"]) == 0
    capsys.readouterr()
    options = ["train_dataloader.batch_size=8", "train_dataloader.num_batch_per_epoch=8", "optim_wrapper.accumulative_counts=2"]
    assert main_train([str(config), "--work-dir", str(work), "--resume", "--cfg-options", *options]) == 1
    assert "--resume: the checkpoint has 4 batches behind it in 1 epochs, this train_dataloader would have 8" in one_line(
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["optim_wrapper.optimizer._delete_=True", "optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.lr=0.1"],
            "no momentum",
        ),
        (["optim_wrapper.constructor=DefaultOptimWrapperConstructor"], "the checkpoint has groups of"),
    ],
)
def test_resume_with_another_optimizer(tiny, options, message, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"]) == 0
    capsys.readouterr()
    assert main_train([str(config), "--work-dir", str(work), "--resume", "--cfg-options", *options]) == 1
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("decay", [-1, 0, 1.5, "a"])
def test_a_layer_decay_that_is_no_share(decay):
    with pytest.raises(UserError, match=r"paramwise_cfg.layer_decay: got .*, expected a number in \(0, 1\]"):
        OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3}}, {"layer_decay": decay})


@pytest.fixture
def mirrored(photographs, tmp_path):
    """A config of two classes, the options that name them the other way round, and a work directory."""
    config, names = tmp_path / "two.py", tmp_path / "names.txt"
    config.write_text(
        f"_base_ = {str(config_path('classification/vmamba-nano_imagefolder'))!r}\n"
        f"data_root = {str(photographs)!r}\ninput_size = 32\n"
        "model = dict(backbone=dict(model_name='test_resnet', num_classes=2))\n"
        "train_cfg = dict(max_epochs=1, val_interval=1)\ntrain_dataloader = dict(batch_size=4, num_workers=0)\n"
        "val_dataloader = dict(num_workers=0)\ntest_dataloader = dict(num_workers=0)\nparam_scheduler = []\n"
    )
    names.write_text("dark\nbright\n")
    return config, {split: f"{split}_dataloader.dataset.class_map={names}" for split in ("train", "val", "test")}, tmp_path / "work"


def test_labels_in_another_order_than_in_training(mirrored, capsys):
    """In validation, on resuming and in a test: the number of classes is the same, and every percentage would be wrong."""
    config, maps, work = mirrored
    command, message = [str(config), "--work-dir", str(work)], "label 0 is {!r} in the {} data and {!r} in training"
    assert main_train([*command, "--cfg-options", maps["train"]]) == 1
    assert message.format("bright", "val", "dark") in one_line(capsys.readouterr().err)
    assert main_train([*command, "--cfg-options", *maps.values()]) == 0
    capsys.readouterr()
    assert main_test([str(config), str(work / "epoch_1.pth")]) == 1
    assert message.format("bright", "test", "dark") in one_line(capsys.readouterr().err)
    assert main_test([str(config), str(work / "epoch_1.pth"), "--cfg-options", maps["test"]]) == 0
    capsys.readouterr()
    assert main_train([*command, "--resume", "--cfg-options", "train_cfg.max_epochs=2"]) == 1
    assert message.format("bright", "train", "dark") in one_line(capsys.readouterr().err)


def test_a_full_disk_is_noticed_before_training(tiny, monkeypatch, capsys):
    config, work = tiny
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(MMEngineRunner, "train", lambda self: pytest.fail("training has started"))
    assert main_train([str(config), "--work-dir", str(work)]) == 1
    assert f"--work-dir: {work} has 1 MB left, 3 checkpoints need" in one_line(capsys.readouterr().err)


def test_one_checkpoint_is_too_few(tiny, monkeypatch, capsys):
    config, work = tiny
    monkeypatch.setattr(MMEngineRunner, "train", lambda self: pytest.fail("training has started"))
    options = ["--cfg-options", "default_hooks.checkpoint.max_keep_ckpts=1"]
    assert main_train([str(config), "--work-dir", str(work), *options]) == 1
    assert "max_keep_ckpts: got 1, expected at least 2, or -1 for all" in one_line(capsys.readouterr().err)


def write_log(work, start, rows, end=""):
    log = work / start / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(map(json.dumps, rows)) + end)


def test_half_a_line_in_a_log_is_left_out(tmp_path):
    rows = [{"loss": 2.0, "iter": 1, "epoch": 1}, {"accuracy/top1": 50.0, "step": 1}]
    write_log(tmp_path, "20260101_000000", rows, end='\n{"loss": 1.0, "it')
    assert read_logs(tmp_path) == (rows[:1], rows[1:])


def test_a_curve_goes_on_where_the_later_run_begins(tmp_path):
    """A killed run resumed from epoch 1, a test in between."""
    training = [{"loss": 3.0 - epoch, "iter": 10 * epoch, "epoch": epoch} for epoch in (1, 2, 3)]
    validation = [{"accuracy/top1": 10.0 * epoch, "step": epoch} for epoch in (1, 2, 3)]
    write_log(tmp_path, "20260101_000000", [*training, *validation])
    write_log(tmp_path, "20260102_000000", [{"accuracy/top1": 1.0, "step": 0}])
    again = [{"loss": 0.5, "iter": 15, "epoch": 2}, {"accuracy/top1": 30.0, "step": 2}, {"accuracy/top1_trained": 20.0, "step": 2}]
    write_log(tmp_path, "20260103_000000", again)
    assert read_logs(tmp_path) == ([training[0], again[0]], [validation[0], {**again[1], **again[2]}])


def test_a_new_run_in_the_folder_of_another_has_a_curve_of_its_own(tmp_path):
    write_log(tmp_path, "20260101_000000", [{"loss": 2.0, "iter": 50, "epoch": 5}, {"accuracy/top1": 50.0, "step": 5}])
    rows = [{"loss": 3.0, "iter": 10, "epoch": 1}, {"accuracy/top1": 5.0, "step": 1}]
    write_log(tmp_path, "20260102_000000", rows)
    assert read_logs(tmp_path) == (rows[:1], rows[1:])


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tiny, monkeypatch, capsys):
    config, _ = tiny
    monkeypatch.setattr(MMEngineRunner, "train", lambda self: pytest.fail("training has started"))
    assert main_train([str(config), "--work-dir", "/proc/nobody/writes/here"]) == 1
    assert "--work-dir: cannot write to /proc/nobody/writes/here: " in one_line(capsys.readouterr().err)


def test_commands_of_the_package_do_the_same(tiny, tmp_path, monkeypatch, capsys):
    """By the name of a shipped config; what the user can correct is one line, as everywhere."""
    _, work = tiny
    small = ["model.backbone.model_name=test_resnet", "train_dataloader.num_batch_per_epoch=1", "train_cfg.max_epochs=1"]
    small += ["val_dataloader.num_batch_per_epoch=1", "test_dataloader.num_batch_per_epoch=1"]
    assert main(["train", "vmamba-nano_digits", "--work-dir", str(work), "--cfg-options", *small]) == 0
    (trained,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("top-1"))
    checkpoint = str(work / "epoch_1.pth")
    assert main(["test", "vmamba-nano_digits", checkpoint, "--work-dir", str(tmp_path / "test"), "--cfg-options", *small]) == 0
    assert trained in capsys.readouterr().out
    arguments = ["test", "vmamba-nano_digits", checkpoint, "--tta", "--work-dir", str(tmp_path / "tta"), "--cfg-options"]
    assert main([*arguments, *small]) == 0
    assert "flip_test=True" in next((tmp_path / "tta").glob("*.py")).read_text()
    capsys.readouterr()
    assert main(["train", "vmamba-nano_digts"]) == 1
    message = one_line(capsys.readouterr().err)
    assert message.startswith(
        "visionssm train: config file not found: vmamba-nano_digts; did you mean classification/vmamba-nano_digits.py"
    )
    monkeypatch.setitem(sys.modules, "visionssm.engine.launch", None)
    assert main(["test", "vmamba-nano_digits", checkpoint]) == 1
    assert one_line(capsys.readouterr().err).startswith("visionssm test: ")


def test_tta_is_for_classifiers(tiny, capsys):
    config, work = tiny
    config.write_text(config.read_text() + "model = dict(_delete_=True, type='mmdet.RetinaNet')\n")
    assert main_test([str(config), "some.pth", "--work-dir", str(work), "--tta"]) == 1
    assert "--tta: expected a model of type visionssm.ImageClassifier or" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("written", "wrapper"), [("OptimWrapper", "visionssm.OptimWrapper"), ("AmpOptimWrapper", "AmpOptimWrapper")]
)
def test_amp_leaves_a_wrapper_of_another_kind(written, wrapper):
    cfg = Config({"optim_wrapper": {"type": written, "dtype": None}})
    _use_amp(cfg)
    assert cfg.optim_wrapper == {"type": wrapper, "dtype": "bfloat16" if wrapper == "visionssm.OptimWrapper" else None}
