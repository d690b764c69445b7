import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visionssm.engine import Digits, HubImages, ImageFolder, ImageStream
from visionssm.engine.data import IGNORED, collate
from visionssm.engine.launch import main_train
from visionssm.errors import UserError

FOLDER = "classification/vmamba-nano_imagefolder"


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    counts = np.bincount(test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37
    assert test.labels == Digits("test").labels
    assert len({image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}) == 0


def test_digits_sample():
    sample = Digits("test", input_size=32)[0]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.uint8
    assert sample["image"].max() > 200
    assert Digits("test", input_size=(24, 40))[0]["image"].shape == (3, 24, 40)
    with pytest.raises(UserError, match="split: got 'val'"):
        Digits("val")


def test_folder_classes_and_batch(photographs):
    dataset = ImageFolder(str(photographs), "test", input_size=32)
    assert dataset.metainfo["classes"] == ("bright", "dark")
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate)))
    assert batch["images"].shape == (4, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert batch["images"][0].float().mean() > 150 > 100 > batch["images"][3].float().mean()


def test_a_class_missing_in_test_keeps_its_index(photographs):
    for file in (photographs / "test/bright").iterdir():
        file.unlink()
    (photographs / "test/bright").rmdir()
    dataset = ImageFolder(str(photographs), "test", input_size=32)
    assert {dataset[index]["label"] for index in range(len(dataset))} == {1}


def test_folder_errors(photographs, tmp_path):
    with pytest.raises(UserError, match=r"photographs: holds test, train, val; expected the split 'validation' in it"):
        ImageFolder(str(photographs), "validation")
    (tmp_path / "empty/train/cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images in .*empty/train/<class>/; files looked for: .*\.jpg"):
        ImageFolder(str(tmp_path / "empty"), "train")
    (photographs / "val/dark/deep").mkdir()
    with pytest.raises(UserError, match=r"val/dark holds folders \(deep\); images must lie directly in it"):
        ImageFolder(str(photographs), "val")
    (photographs / "test/grey").mkdir()
    with pytest.raises(UserError, match=r"holds classes that .*train lacks: grey"):
        ImageFolder(str(photographs), "test")


def break_images(folder, count):
    files = sorted(folder.glob("*.jpg"))[:count]
    files[0].write_bytes(b"no image at all")
    for file in files[1:]:
        file.write_bytes(file.read_bytes()[:200])  # ends in the middle of the pixels
    return [str(file) for file in files]


def test_unreadable_images(photographs):
    broken = break_images(photographs / "train/bright", 2)
    train = ImageFolder(str(photographs), "train", input_size=32)
    assert train[0]["unreadable"] == tuple(broken)  # the third image stands in
    assert train[0]["label"] == 0
    assert train[0]["image"].float().mean() > 100
    broken = break_images(photographs / "test/dark", 1)
    test = ImageFolder(str(photographs), "test", input_size=32)
    assert [test[index]["label"] for index in range(4)] == [0, 0, IGNORED, 1]
    assert test[2]["unreadable"] == tuple(broken)


def test_no_readable_image_left(photographs):
    for name in ("bright", "dark"):
        break_images(photographs / "train" / name, 6)
    with pytest.raises(UserError, match=r"none of the 12 images in .*train can be read"):
        ImageFolder(str(photographs), "train", input_size=32)[3]


def test_training_counts_unreadable_images(photographs, tmp_path, capsys):
    broken = break_images(photographs / "train/bright", 2) + break_images(photographs / "test/dark", 1)
    options = [f"data_root={photographs}", "input_size=32", "model.backbone.model_name=test_resnet", "train_cfg.max_epochs=1"]
    options += [f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")]
    assert main_train([str(FOLDER), "--work-dir", str(tmp_path / "work"), "--cfg-options", *options]) == 0
    out = capsys.readouterr().out
    listing = re.search(r"^3 images could not be read and were skipped: (.*unreadable\.txt)$", out, re.MULTILINE).group(1)
    with open(listing, encoding="utf-8") as file:
        assert sorted(file.read().splitlines()) == sorted(broken)
    assert re.search(r"^top-1: (0\.0|33\.3|66\.7|100\.0) %$", out, re.MULTILINE)  # of the three images that are left


def test_no_readable_image_left_in_a_worker(photographs, tmp_path):
    """The error crosses a process, which puts a traceback before it; the command still prints one line."""
    for name in ("bright", "dark"):
        break_images(photographs / "train" / name, 6)
    options = [f"data_root={photographs}", "input_size=32", "model.backbone.model_name=test_resnet"]
    command = [sys.executable, "tools/train.py", str(FOLDER), "--work-dir", str(tmp_path / "work"), "--cfg-options", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert run.returncode == 1
    # Before it, torch may warn of more workers than this machine has processors.
    assert re.match(r"train\.py: error: data_root: none of the 12 images in .*train can be read", run.stderr.splitlines()[-1])
    assert "Traceback" not in run.stderr


def test_class_map_orders_the_labels(photographs, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("dark\ngrey\nbright\n")
    dataset = ImageFolder(str(photographs), "test", input_size=32, class_map=str(names))
    assert dataset.metainfo["classes"] == ("dark", "grey", "bright")
    samples = [dataset[index] for index in range(4)]
    assert [sample["label"] for sample in samples] == [2 if sample["image"].float().mean() > 100 else 0 for sample in samples]
    assert {sample["label"] for sample in samples} == {0, 2}
    names.write_text("dark\n")
    with pytest.raises(UserError, match=r"holds classes that .*classes.txt lacks: bright"):
        ImageFolder(str(photographs), "test", class_map=str(names))
    names.write_text("dark\ndark\n")
    with pytest.raises(UserError, match=r"classes.txt: dark comes twice"):
        ImageFolder(str(photographs), "test", class_map=str(names))


@pytest.fixture
def parquet(tmp_path):
    """A data set as the hub keeps them: four files for training, one for validation, of images with names for the labels."""
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    for split, shards in (("train", 4), ("validation", 1)):
        for shard in range(shards):
            images = [Image.new("RGB", (20, 20), (level + shard,) * 3) for level in (10, 200, 30)]
            part = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0]}, features=features)
            part.to_parquet(folder / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet")
    return folder


@pytest.fixture
def quiet_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_hub_images(parquet, quiet_hub, tmp_path):
    arguments = {"data_root": str(tmp_path / "cache"), "input_size": 16}
    dataset = HubImages(str(parquet), "validation", **arguments)
    assert dataset.metainfo["classes"] == ("dark", "bright")
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=collate)))
    assert batch["images"].float().mean((1, 2, 3)).round().tolist() == [10, 200, 30]
    assert batch["labels"].tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"dataset.name: .*parquet, split 'test': "):
        HubImages(str(parquet), "test", **arguments)
    with pytest.raises(UserError, match=r"dataset.target_key: .*parquet has no column 'lable'; did you mean label"):
        HubImages(str(parquet), "train", target_key="lable", **arguments)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_rows_without_an_image_or_a_label(parquet, quiet_hub, tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    (file,) = (parquet / "data").glob("validation-*")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["dark", "bright"])})
    Dataset.from_dict({"image": [None, Image.new("RGB", (20, 20))], "label": [0, -1]}, features=features).to_parquet(file)
    dataset = HubImages(str(parquet), "validation", str(tmp_path / "cache"), 16)
    assert dataset[0]["label"] == IGNORED
    assert dataset[0]["unreadable"] == (f"{parquet}/validation[0]",)
    with pytest.raises(UserError, match="dataset: the split 'validation' has the label -1, expected 0 to 1"):
        dataset[1]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_with_fewer_shards_than_workers(parquet, quiet_hub, tmp_path):
    stream = ImageStream(f"hfids/{parquet}", "train", str(tmp_path / "cache"), num_classes=2, num_samples=12, input_size=16)
    stream.set_loader(2, 5)
    with pytest.raises(UserError, match=r"dataset 'train': Streaming dataset .* 4 shard\(s\) .* the loader has 5 workers"):
        list(DataLoader(stream, batch_size=2, num_workers=5, collate_fn=collate))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_hub_stream(parquet, quiet_hub, tmp_path):
    def levels(split, epoch):
        sizes = {"num_classes": 2, "num_samples": 12 if split == "train" else 3, "input_size": 16}
        sizes |= {"transform": {"color_jitter": None}} if split == "train" else {}
        stream = ImageStream(f"hfids/{parquet}", split, str(tmp_path / "cache"), **sizes)
        stream.set_loader(2, 0)
        stream.set_epoch(epoch)
        samples = list(stream)
        assert all(sample["label"] == (sample["image"].float().mean() > 100) for sample in samples)
        return [round(sample["image"].float().mean().item()) for sample in samples]

    first = levels("train", 0)
    assert sorted(first) == sorted(level + shard for level in (10, 200, 30) for shard in range(4))
    assert first == levels("train", 0) != levels("train", 1)
    assert levels("validation", 0) == [10, 200, 30]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("visionssm.engine.data.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package webdataset: pip install webdataset"):
        ImageStream("wds/", "train", "somewhere", num_classes=2)
    with pytest.raises(UserError, match="hub data set x/y needs the package datasets: pip install datasets"):
        HubImages("x/y", "train")
