"""Whole runs: train, resume, interrupt, test."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config

from visionssm import config_path
from visionssm.engine import Runner
from visionssm.engine.launch import INTERRUPTED, main_test, main_train, newest_checkpoint
from visionssm.engine.values import check_values
from visionssm.errors import UserError

DIGITS = "classification/vmamba-nano_digits"
FOLDER = "classification/vmamba-nano_imagefolder"
TOOLS = Path(__file__).parents[2] / "tools"


def state(checkpoint):
    return torch.load(checkpoint, weights_only=False)["state_dict"]  # the file was written by this test


def test_train_then_test(tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work)]) == 0
    out = capsys.readouterr().out
    accuracy = re.search(r"^top-1: (\d+\.\d) %$", out, re.MULTILINE).group(1)
    assert re.search(
        r"^epoch 2/2  loss \d+\.\d+  accuracy \d+\.\d  lr \S+  \d+ images/s  \d+\.\d GB  left 0:00:00\n"
        r"epoch 2/2  val top1 \d+\.\d$",
        out,
        re.MULTILINE,
    )
    assert "WARNING" not in out
    (log,) = work.glob("*/*.log")
    for place in (work / "epoch_2.pth", work / "predictions.png", work / "learning_curve.png", work / "timm", log):
        assert place.exists()
        assert str(place) in out
    assert "Epoch(train) [2]" in log.read_text() or "Epoch(val) [2]" in log.read_text()
    assert not list(work.glob("*.partial"))

    assert main_test([str(config), str(work / "epoch_2.pth"), "--work-dir", str(work / "test")]) == 0
    assert f"top-1: {accuracy} %" in capsys.readouterr().out


def test_training_without_checkpoints(tiny, capsys):
    """As on a process that is done before the first one has written its file: there is none to name."""
    config, work = tiny
    options = ("default_hooks.checkpoint=None", "train_cfg.max_epochs=1")
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", *options]) == 0
    out = capsys.readouterr().out
    assert "top-1: " in out
    assert "checkpoint " not in out


def test_exported_weights_are_the_trained_ones(tiny):
    config, work = tiny
    main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"])
    model = timm.create_model(f"local-dir:{work / 'timm'}", pretrained=True)
    trained = state(work / "epoch_1.pth")
    assert {f"backbone.{name}" for name in model.state_dict()} == set(trained)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[f"backbone.{name}"], rtol=0, atol=0)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_resume_ends_where_an_uninterrupted_run_ends(tiny, capsys):
    config, work = tiny
    main_train([str(config), "--work-dir", str(work)])
    resumed = work.with_name("resumed")
    resumed.mkdir()
    shutil.copy(work / "epoch_1.pth", resumed)
    assert main_train([str(config), "--work-dir", str(resumed), "--resume"]) == 0
    assert f"resuming from {resumed / 'epoch_1.pth'}" in capsys.readouterr().out
    expected, got = state(work / "epoch_2.pth"), state(resumed / "epoch_2.pth")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_resume_without_a_checkpoint_starts_anew(tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--resume", "--cfg-options", "train_cfg.max_epochs=1"]) == 0
    assert f"no checkpoint in {work} yet: starting anew" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", [{}, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}], ids=len)
def test_ctrl_c_leaves_a_usable_checkpoint(tiny, launcher):
    """By itself, and as torchrun starts a process."""
    config, work = tiny
    if launcher:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            launcher = launcher | {"MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, str(TOOLS / "train.py"), str(config), "--work-dir", str(work)]
    process = subprocess.Popen(
        [*command, "--cfg-options", "train_cfg.max_epochs=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **launcher},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while newest_checkpoint(work) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    last = out.splitlines()[-1]
    assert re.match(r"interrupted in epoch \d+ of 10000: last checkpoint .*epoch_\d+\.pth; go on with: .* --resume$", last)
    assert not list(work.glob("*.partial"))
    epoch = int(re.search(r"epoch_(\d+)", newest_checkpoint(work)).group(1))
    assert main_train([str(config), "--work-dir", str(work), "--resume", "--cfg-options", f"train_cfg.max_epochs={epoch + 1}"]) == 0
    assert (work / f"epoch_{epoch + 1}.pth").exists()


def test_an_interruption_while_the_config_is_formatted(tiny, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    config, work = tiny
    save_checkpoint = Runner.save_checkpoint

    def saving(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", interrupted)
            save_checkpoint(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "save_checkpoint", saving)
    assert main_train([str(config), "--work-dir", str(work)]) == INTERRUPTED
    assert "interrupted in epoch 1 of 2: no checkpoint had been written yet" in capsys.readouterr().out
    monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", interrupted)
    assert main_train([str(config), "--work-dir", str(work)]) == INTERRUPTED


def test_a_failed_write_keeps_the_last_checkpoint(tiny, monkeypatch):
    config, work = tiny
    save = torch.save

    def failing(checkpoint, file, *args, **kwargs):
        if checkpoint["meta"]["epoch"] == 2:
            raise OSError("No space left on device")
        save(checkpoint, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        main_train([str(config), "--work-dir", str(work), "--cfg-options", "default_hooks.checkpoint.max_keep_ckpts=2"])
    assert newest_checkpoint(work) == str(work / "epoch_1.pth")
    assert state(work / "epoch_1.pth")
    assert not list(work.glob("*.partial"))


def test_checkpoint_of_another_model(tiny, capsys):
    config, work = tiny
    main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"])
    checkpoint = str(work / "epoch_1.pth")
    other = ["--work-dir", str(work / "other"), "--cfg-options", "model.backbone.model_name=test_vit", "model.backbone.img_size=32"]
    assert main_test([str(config), checkpoint, *other]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "is not of this model" in err
    assert "unexpected key" in err
    assert "missing keys" in err
    assert "more" in err


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


@pytest.mark.parametrize("content", ["text", "code"])
def test_a_file_that_is_no_checkpoint(content, tiny, capsys, tmp_path, monkeypatch):
    config, work = tiny
    monkeypatch.chdir(tmp_path)
    if content == "text":
        Path("other.pth").write_text("no checkpoint")
    else:
        torch.save({"state_dict": Intruder()}, "other.pth")
    assert main_test([str(config), "other.pth", "--work-dir", str(work)]) == 1
    captured = capsys.readouterr()
    check_one_line(captured.err, "checkpoint: other.pth cannot be read: ")
    assert not Path("intruder").exists()


def test_missing_checkpoint(tiny, capsys):
    config, work = tiny
    assert main_test([str(config), "nowhere.pth", "--work-dir", str(work)]) == 1
    assert "checkpoint: no such file: nowhere.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("modle.backbone.model_name=x", "--cfg-options modle.*: the config has no 'modle'; did you mean model"),
        ("model.backbon.model_name=x", "--cfg-options model.backbon.*: model has no 'backbon'; did you mean backbone"),
        ("train_dataloder=x", "--cfg-options train_dataloder: the config has no .*; did you mean train_dataloader"),
        ("model.type=visionssm.ImageClasifier", "model.type: unknown type .*; did you mean visionssm.ImageClassifier"),
        ("train_dataloader.dataset.type=visionssm.Digit", "dataset.type: unknown type .*; did you mean visionssm.Digits"),
        ("model.label_smoothing.x=1", "model.label_smoothing is 0.1 and has no keys"),
        (
            "model.label_smooth=0.1",
            "model.label_smooth: .*ImageClassifier has no such argument; did you mean label_smoothing",
        ),
        ("train_dataloader.batchsize=3", "train_dataloader.batchsize: DataLoader has no such .*; did you mean batch_size"),
        ("optim_wrapper.optimizer.weight_deca=0", "optimizer.weight_deca: AdamW has no such .*; did you mean weight_decay"),
        ("train_dataloader.dataset.transform.hflp=0", "transform.hflp: timm.*; did you mean hflip"),
        ("model.backbone.model_name=test_resnt", "model_name: unknown model 'test_resnt'; did you mean test_resnet"),
        ("model.backbone.drop_path_rat=0.1", "drop_path_rat: test_resnet has no such argument; did you mean drop_path_rate"),
        ("model.backbone.num_classes=7", "model.backbone.num_classes: got 7, the train data has 10 classes"),
        ("train_cfg.max_epochs=abc", "train_cfg.max_epochs: got 'abc', expected a whole number, at least 1"),
        ("train_cfg.max_epochs=1.5", "train_cfg.max_epochs: got 1.5, expected a whole number, at least 1"),
        ("train_dataloader.batch_size=0", "train_dataloader.batch_size: got 0, expected a whole number, at least 1"),
        ("train_dataloader.num_workers=-1", "train_dataloader.num_workers: got -1, expected a whole number, at least 0"),
        ("optim_wrapper.accumulative_counts=0", "optim_wrapper.accumulative_counts: got 0, expected a whole number, at least 1"),
        ("optim_wrapper.optimizer.lr=1e-3x", "optim_wrapper.optimizer.lr: got '1e-3x', expected a number, at least 0"),
        ("optim_wrapper.clip_grad.max_norm=-1", "optim_wrapper.clip_grad.max_norm: got -1, expected a number, at least 0"),
        ("optim_wrapper.clip_grad.max_nrm=1", "clip_grad.max_nrm: expected parameters, max_norm, .*; did you mean max_norm"),
        ("optim_wrapper.clip_grad=5", "optim_wrapper.clip_grad: got 5, expected a dict of values"),
        ("train_dataloader.sampler.shuffle=abc", "train_dataloader.sampler.shuffle: got 'abc', expected True or False"),
        ("model.label_smoothing=2", "model.label_smoothing: got 2, expected a number from 0 to below 1"),
        ("val_evaluator.topk=5", "topk: got 5, expected a list of whole numbers, at least 1"),
        ("randomness.seed=abc", "randomness.seed: got 'abc', expected a whole number, at least 0"),
        ("input_size=0", "input_size: got 0, expected a whole number of pixels"),
        ("model.backbone=vmamba_nano", "model.backbone: got 'vmamba_nano', expected a dict of values"),
        ("model.mixup={'mixup_alpha':0.8}", "model.mixup: got \"{'mixup_alpha':0.8}\", expected a dict of values"),
        ("val_dataloader=None", "val_dataloader, val_cfg, val_evaluator: expected all or none; val_dataloader is None"),
        ("optim_wrapper.optimizer.lr=None", "optim_wrapper.optimizer.lr: got None, expected a number, at least 0"),
        ("optim_wrapper.optimizer.betas=0.9", "config: AdamW cannot be built of what it is given: TypeError: "),
        ("default_hooks.logger.interval=0", "default_hooks.logger.interval: got 0, expected a whole number, at least 1"),
        ("default_hooks.checkpoint.interval=0", "checkpoint.interval: got 0, expected a whole number, at least 1, or -1 for never"),
        ("param_scheduler.0.end=0", "param_scheduler.0.end: got 0, expected more than 0, where LinearLR begins"),
    ],
)
def test_wrong_option_is_one_line(option, message, tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", option]) == 1
    check_one_line(capsys.readouterr().err, message)


def test_mixup_modes():
    cfg = Config({"model": {"mixup": {"mixup_alpha": 0.8, "mode": "elem"}}})
    check_values(cfg)
    cfg.model.mixup.mode = "bach"  # timm would mix batches
    with pytest.raises(UserError, match=r"model\.mixup\.mode: got 'bach', expected one of batch, pair, elem"):
        check_values(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classification/vmamba-nano_digit.py"], "config file not found: .*; did you mean .*vmamba-nano_digits.py"),
        ([FOLDER], "data_root: none given; add --cfg-options data_root=FOLDER"),
        ([FOLDER, "--cfg-options", "data_root=/no/where"], "data_root: /no/where: no such folder"),
    ],
)
def test_missing_files_are_one_line(arguments, message, capsys):
    assert main_train(arguments) == 1
    check_one_line(capsys.readouterr().err, message)


def check_one_line(err, message):
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = 'nowhere.py'", "slip.py: .*nowhere.py"),
        ("model = dict(", "slip.py: SyntaxError: "),
        ("model = 1 / 0", "slip.py: ZeroDivisionError: division by zero"),
    ],
)
def test_config_file_that_does_not_load(text, message, tmp_path, capsys):
    config = tmp_path / "slip.py"
    config.write_text(text)
    assert main_train([str(config)]) == 1
    check_one_line(capsys.readouterr().err, message)


def test_work_dir_that_is_a_file(tiny, capsys, tmp_path):
    config, _ = tiny
    (tmp_path / "file").touch()
    assert main_train([str(config), "--work-dir", str(tmp_path / "file")]) == 1
    check_one_line(capsys.readouterr().err, "--work-dir: .*file")


def test_unknown_key_in_a_config_file(tmp_path, capsys):
    config = tmp_path / "slip.py"
    config.write_text(f"_base_ = {str(config_path(DIGITS))!r}\noptim_wraper = dict()\n")
    assert main_train([str(config)]) == 1
    assert "unknown key 'optim_wraper'; did you mean optim_wrapper?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_float16_needs_a_gpu(tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", "optim_wrapper.dtype=float16"]) == 1
    check_one_line(capsys.readouterr().err, "optim_wrapper.dtype: float16 needs a GPU, and torch sees none; .*bfloat16")
