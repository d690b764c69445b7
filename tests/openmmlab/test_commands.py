"""Detectors and segmentors through `visionssm train` and `test`, and what they say to wrong data."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from visionssm.cli import main
from visionssm.engine.launch import main_test, main_train

SHORT = {
    "detection/mask-rcnn_vmamba-nano_fpn_digit-scenes": ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=4"],
    "segmentation/upernet_vmamba-nano_digit-scenes": ["train_cfg.max_iters=2", "default_hooks.checkpoint.interval=2"],
}
DETECTOR = next(iter(SHORT))


def options(name, root):
    common = [f"data_root={root}", "test_dataloader.dataset.indices=2", "test_dataloader.num_workers=0"]
    workers = ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
    return ["--cfg-options", *common, *workers, *SHORT[name]]


@pytest.mark.parametrize("name", SHORT)
def test_train_and_test(name, digit_scenes, tmp_path, capsys, fresh_mmengine):
    arguments = ["--work-dir", str(tmp_path), *options(name, digit_scenes)]
    assert main_train([name, *arguments]) == 0, capsys.readouterr().err
    checkpoint = next(tmp_path.glob("*_[12].pth"))
    fresh_mmengine()
    capsys.readouterr()
    assert main_test([name, str(checkpoint), *arguments]) == 0
    assert str(checkpoint) in capsys.readouterr().out


def test_a_converted_file_is_tested(digit_scenes, tmp_path, capsys, fresh_mmengine):
    """What `visionssm convert` makes of a detector's file has the same metrics; one of other names is refused."""
    arguments = ["--work-dir", str(tmp_path), *options(DETECTOR, digit_scenes)]
    assert main_train([DETECTOR, *arguments]) == 0, capsys.readouterr().err
    assert main(["convert", str(tmp_path / "epoch_1.pth"), "--model", "vmamba_nano", "-o", str(tmp_path / "d.safetensors")]) == 0
    printed = []
    for name in ("epoch_1.pth", "d.safetensors"):
        fresh_mmengine()
        capsys.readouterr()
        gone = "model.backbone.pretrained=gone.pth"  # what training began with is not needed any more
        assert main_test([DETECTOR, str(tmp_path / name), *arguments, gone]) == 0, capsys.readouterr().err
        printed.append([line for line in capsys.readouterr().out.splitlines() if "mAP" in line])
    assert printed[0] == printed[1] != []
    fresh_mmengine()
    assert main_train([DETECTOR, "--resume", *arguments, gone, "train_cfg.max_epochs=2"]) == 0, capsys.readouterr().err
    weights = load_file(tmp_path / "d.safetensors")
    save_file({name: value for name, value in weights.items() if "rpn" not in name}, tmp_path / "d.safetensors")
    fresh_mmengine()
    assert main_test([DETECTOR, str(tmp_path / "d.safetensors"), *arguments]) == 1
    assert "is not of this model: missing keys in source state_dict: rpn_head" in capsys.readouterr().err


def test_mixed_precision_of_a_detector(digit_scenes, tmp_path, capsys, fresh_mmengine):
    arguments = ["--work-dir", str(tmp_path), "--amp", *options(DETECTOR, digit_scenes)]
    assert main_train([DETECTOR, *arguments]) == 0, capsys.readouterr().err
    fresh_mmengine()
    assert main_train([DETECTOR, *arguments, "optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.dtype=bfloat16"]) == 1
    assert "pass optim_wrapper.type=visionssm.OptimWrapper" in capsys.readouterr().err


def test_missing_annotation_file(digit_scenes, tmp_path, capsys):
    assert main_train([DETECTOR, "--work-dir", str(tmp_path), *options(DETECTOR, digit_scenes / "elsewhere")]) == 1
    message = capsys.readouterr().err
    assert "train_dataloader.dataset.ann_file: no such file or folder" in message
    assert "data_root=" in message


def test_missing_annotation_file_of_a_metric(digit_scenes, tmp_path, capsys):
    """It is read after training, and missed before."""
    change = f"test_evaluator.ann_file={tmp_path}/none.json"
    assert main_train([DETECTOR, "--work-dir", str(tmp_path), *options(DETECTOR, digit_scenes), change]) == 1
    assert "test_evaluator.ann_file: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"images": ['])
def test_broken_annotation_file(digit_scenes, tmp_path, capsys, content):
    (tmp_path / "broken.json").write_text(content)
    change = f"train_dataloader.dataset.ann_file={tmp_path}/broken.json"
    assert main_train([DETECTOR, "--work-dir", str(tmp_path), *options(DETECTOR, digit_scenes), change]) == 1
    assert f"dataset.ann_file: {tmp_path}/broken.json cannot be read as COCO's format" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_image(digit_scenes, tmp_path, capsys, workers):
    content = json.loads((digit_scenes / "annotations" / "instances_train.json").read_text())
    images = [{**image, "file_name": f"no-{image['file_name']}"} for image in content["images"]]
    (tmp_path / "renamed.json").write_text(json.dumps({**content, "images": images}))
    changes = [f"train_dataloader.dataset.ann_file={tmp_path}/renamed.json", f"train_dataloader.num_workers={workers}"]
    assert main_train([DETECTOR, "--work-dir", str(tmp_path), *options(DETECTOR, digit_scenes), *changes]) == 1
    assert re.fullmatch(r"\S+: error: \[Errno 2\] No such file or directory: '\S+/train/no-\d+.png'\n", capsys.readouterr().err)


def test_no_image_with_boxes(digit_scenes, tmp_path, capsys):
    content = json.loads((digit_scenes / "annotations" / "instances_train.json").read_text())
    empty = digit_scenes / "annotations" / "empty.json"
    empty.write_text(json.dumps({**content, "annotations": []}))
    change = "train_dataloader.dataset.ann_file=annotations/empty.json"
    arguments = [argument for argument in options(DETECTOR, digit_scenes) if "train_dataloader.dataset.indices" not in argument]
    assert main_train([DETECTOR, "--work-dir", str(tmp_path), *arguments, change]) == 1
    assert "no image is left; a detector's filter_cfg drops images without boxes" in capsys.readouterr().err
