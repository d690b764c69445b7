"""Two processes on a CPU, started once for all tests of this file."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch.utils.data import DataLoader

from visionssm import config_path
from visionssm.engine import ImageStream, RepeatedAugmentation, Runner
from visionssm.engine.launch import main_train
from visionssm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open
needs_webdataset = pytest.mark.skipif(find_spec("webdataset") is None, reason="needs the package webdataset")
needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package datasets")
PLAIN = """
_base_ = {base!r}
model = dict(backbone=dict(model_name="test_vit", img_size=32))
augmentation = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))
train_cfg = dict(max_epochs=1, val_interval=1)
train_dataloader = dict(batch_size=16, num_batch_per_epoch=4, dataset=dict(transform=augmentation))
val_dataloader = dict(batch_size=30)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.1, momentum=0.9), clip_grad=dict(max_norm=0.5))
param_scheduler = None  # in iterations, of which accumulated batches have more
"""


def write_shards(folder, shards=8, images=6):
    """Images of one colour each; the label is the image's number."""
    lengths = [images] * shards
    for split in ("train", "validation"):
        for shard in range(shards):
            with tarfile.open(folder / f"{split}-{shard:02}.tar", "w") as tar:
                for index in range(shard * images, (shard + 1) * images):
                    png = io.BytesIO()
                    Image.fromarray(np.full((20, 20, 3), index, dtype=np.uint8)).save(png, "png")
                    for suffix, content in (("png", png.getvalue()), ("cls", str(index).encode())):
                        entry = tarfile.TarInfo(f"{index:04}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    splits = {
        split: {
            "name": split,
            "filenames": [f"{split}-{shard:02}.tar" for shard in range(shards)],
            "shard_lengths": lengths,
            "num_samples": sum(lengths),
        }
        for split in ("train", "validation")
    }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def write_parquet(folder, files=4, images=12):
    """The same images as the hub keeps them; the labels have no names."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for split in ("train", "validation"):
        for file in range(files):
            labels = list(range(file * images, (file + 1) * images))
            rows = {"image": [Image.new("RGB", (20, 20), (label,) * 3) for label in labels], "label": labels}
            Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-{file:05}-of-{files:05}.parquet")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A config without anything random but the order of the images, and none of it depends on the batch."""
    config = tmp_path_factory.mktemp("plain") / "plain.py"
    config.write_text(PLAIN.format(base=str(config_path("classification/vmamba-nano_digits"))))
    return str(config)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, plain):
    """What two processes have seen and printed, and their work directory."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "shards").mkdir()
    shards = write_shards(folder / "shards") if find_spec("webdataset") else "none"
    (folder / "hub").mkdir()
    hub = write_parquet(folder / "hub") if find_spec("datasets") else "none"
    run = run_twice(Path(__file__).with_name("two_processes.py"), shards, hub, plain, folder)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {"ranks": ranks, "out": run.stdout, "work": folder / "work"}


def run_twice(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return run


def weights(work):
    return torch.load(work / "epoch_1.pth", weights_only=False)["state_dict"]  # the file was written by this test


def train_alone(plain, work, *options):
    assert main_train([plain, "--work-dir", str(work), *(("--cfg-options", *options) if options else ())]) == 0
    return weights(work)


def test_two_processes_train_as_one_and_so_do_accumulated_batches(pair, plain, tmp_path, capsys):
    """Same images an update, so the same weights up to the order of float32 sums: 1e-5 of each tensor's largest value."""
    alone = train_alone(plain, tmp_path / "alone")
    accuracy = re.search(r"^top-1: .*$", capsys.readouterr().out, re.MULTILINE)[0]
    assert pair["out"].count(accuracy) == 1  # the same result, printed by one of the two
    options = ("train_dataloader.batch_size=8", "train_dataloader.num_batch_per_epoch=8", "optim_wrapper.accumulative_counts=2")
    accumulated = train_alone(plain, tmp_path / "accumulated", *options)
    for name, expected in alone.items():
        for other in (weights(pair["work"]), accumulated):
            torch.testing.assert_close(other[name], expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    fewer = train_alone(plain, tmp_path / "fewer", "train_dataloader.batch_size=8")
    assert max((fewer[name] - value).abs().max().item() for name, value in alone.items()) > 1e-3


RESTLESS = """
#include <unistd.h>
#include <thread>
extern "C" int PyGILState_Ensure();
extern "C" void PyGILState_Release(int);
static void take_turns() noexcept { for (;;) { usleep(1000); PyGILState_Release(PyGILState_Ensure()); } }
extern "C" void start() { std::thread(take_turns).detach(); }
"""
LEAVER = """
import atexit, ctypes, sys, time
from visionssm.engine.distributed import leave
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)
slow = Slow()  # torn down while Python ends
ctypes.CDLL(sys.argv[1]).start()
atexit.register(print, "at the end")
sys.exit(leave(3))
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
@pytest.mark.parametrize("several", [True, False])
def test_a_process_of_several_ends_whatever_its_threads_do(several, tmp_path, monkeypatch):
    """A thread of C++ asks for Python's lock all the time, as gloo's may; a process that ends as usual aborts at that."""
    if several:
        monkeypatch.setenv("LOCAL_RANK", "0")
    else:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    source, library = tmp_path / "restless.cpp", tmp_path / "restless.so"
    source.write_text(RESTLESS)
    subprocess.run(["g++", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)], check=True)
    run = subprocess.run([sys.executable, "-c", LEAVER, str(library)], capture_output=True, text=True, timeout=120)
    assert run.stdout == "at the end\n"
    if several:
        assert (run.returncode, run.stderr) == (3, "")
    elif sys.version_info < (3, 14):
        assert run.returncode == -signal.SIGABRT
        assert "terminate called without an active exception" in run.stderr


@pytest.fixture
def joined(tmp_path, monkeypatch):
    """A group of this process alone."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("own", [{}, {"type": "MMDistributedDataParallel"}])
def test_what_a_config_says_of_its_wrapper_goes_first(joined, own):
    runner = Runner.__new__(Runner)
    runner.cfg, runner._distributed = Config({"find_unused_parameters": False}), True
    model = runner.wrap_model({**own, "find_unused_parameters": True}, torch.nn.Linear(2, 2))
    assert model.find_unused_parameters
    assert model.gradient_as_bucket_view
    assert not model.broadcast_buffers


def test_unreadable_images_of_both_processes_count_once(photographs, tmp_path):
    broken = [photographs / name for name in ("train/dark/0.jpg", "train/dark/1.jpg", "val/dark/1.jpg")]
    for file in broken:
        file.write_bytes(b"")
    options = ["data_root=" + str(photographs), "input_size=32", "model.backbone.model_name=test_resnet", "train_cfg.max_epochs=4"]
    options += ["param_scheduler=None", "train_dataloader.batch_size=2", "val_dataloader.batch_size=1"]
    options += [f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")]
    config = config_path("classification/vmamba-nano_imagefolder")
    train = Path(__file__).parents[2] / "tools" / "train.py"
    run = run_twice(train, config, "--work-dir", tmp_path / "work", "--cfg-options", *options)
    (listing,) = (tmp_path / "work").glob("*/unreadable.txt")
    assert f"3 images could not be read and were skipped: {listing}" in run.stdout
    assert listing.read_text().splitlines() == sorted(map(str, broken))


@needs_webdataset
def test_every_process_trains_on_shards_of_its_own(pair):
    epochs = [rank["shards"]["train"]["epochs"] for rank in pair["ranks"]]
    for number in (0, 1):
        first, second = set(epochs[0][number]), set(epochs[1][number])
        assert not first & second
        assert first | second == set(range(48))
        assert {label // 6 for label in first} & {label // 6 for label in second} == set()
        assert len(epochs[0][number]) == len(epochs[1][number]) == 24
    assert epochs[0][0] != epochs[0][1]
    assert set(epochs[0][0]) != set(epochs[0][1])  # the shards are dealt out anew
    assert [rank["shards"]["train"]["batches"] for rank in pair["ranks"]] == [6, 6]


@needs_datasets
def test_every_process_trains_on_files_of_the_hub_of_its_own(pair):
    epochs = [rank["hub"]["train"]["epochs"] for rank in pair["ranks"]]
    for number in (0, 1):
        first, second = epochs[0][number], epochs[1][number]
        assert sorted(first + second) == list(range(48))
        assert {label // 12 for label in first} & {label // 12 for label in second} == set()
        assert len(first) == len(second) == 24
    assert all(epoch[0] != epoch[1] for epoch in epochs)
    assert [rank["hub"]["train"]["batches"] for rank in pair["ranks"]] == [6, 6]


@pytest.mark.parametrize("kind", [pytest.param("shards", marks=needs_webdataset), pytest.param("hub", marks=needs_datasets)])
def test_every_image_is_validated_once(kind, pair):
    first, second = (rank[kind]["validation"]["epochs"] for rank in pair["ranks"])
    assert sorted(first[0] + second[0]) == list(range(48))
    assert first[0] == first[1]


@needs_webdataset
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_follows_from_seed_and_epoch(num_workers, tmp_path):
    write_shards(tmp_path)

    def labels(epoch, seed=0, begin=True):
        stream = ImageStream("wds/", "train", str(tmp_path), num_classes=48, input_size=16, seed=seed)
        stream.set_loader(4, num_workers)
        for number in range(0 if begin else epoch, epoch + 1):
            stream.set_epoch(number)
            torch.manual_seed(1000 * seed + number)  # as RandomnessHook does; the workers' seeds follow
            found = [sample["label"] for sample in DataLoader(stream, batch_size=None, num_workers=num_workers)]
        return found

    assert labels(2) == labels(2, begin=False)  # a resumed run begins there
    assert len({tuple(labels(*key)) for key in ((0,), (1,), (0, 1))}) == 3


@needs_webdataset
def test_broken_images_in_shards_are_named(tmp_path):
    write_shards(tmp_path, shards=2)
    file = tmp_path / "validation-01.tar"
    content = file.read_bytes()
    place = content.index(b"\x89PNG", content.index(b"0009.png"))
    file.write_bytes(content[:place] + b"nothing!" + content[place + 8 :])
    stream = ImageStream("wds/", "validation", str(tmp_path), num_classes=48, input_size=16)
    samples = list(stream)
    assert [sample["label"] for sample in samples] == [label for label in range(12) if label != 9]
    assert [name for sample in samples for name in sample["unreadable"]] == [f"{file}/0009"]


@needs_webdataset
@pytest.mark.parametrize("missing", ["images", "shards"])
def test_shards_without_a_readable_image_end_the_training(missing, tmp_path):
    write_shards(tmp_path, shards=2)
    for file in tmp_path.glob("train-*.tar"):
        file.write_bytes(file.read_bytes().replace(b"\x89PNG\r\n\x1a\n", b"nothing!")) if missing == "images" else file.unlink()
    stream = ImageStream("wds/", "train", str(tmp_path), num_classes=48, input_size=16)
    with pytest.raises(UserError, match="dataset: the split 'train' has no image that can be read; skipped: "):
        next(iter(stream))


@needs_webdataset
def test_a_label_that_is_no_class(tmp_path):
    write_shards(tmp_path, shards=1)
    stream = ImageStream("wds/", "train", str(tmp_path), num_classes=5, input_size=16)
    with pytest.raises(UserError, match="dataset: the split 'train' has the label 5, expected 0 to 4"):
        list(stream)


@needs_webdataset
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "wsd/"}, r"dataset.name: got 'wsd/', expected 'wds/' or 'hfids/NAME'"),
        ({"data_root": None}, r"data_root: none given"),
        ({"split": "trian"}, r"split 'trian' in .*: split trian not found"),
        ({"num_classes": None}, r"dataset.num_classes: expected a number"),
        ({"class_map": "nowhere.txt"}, r"class_map: nowhere.txt: "),
    ],
)
def test_wrong_streams(arguments, message, tmp_path):
    write_shards(tmp_path, shards=1)
    right = {"name": "wds/", "split": "train", "data_root": str(tmp_path), "num_classes": 48}
    with pytest.raises(UserError, match=message):
        ImageStream(**{**right, **arguments})


@needs_webdataset
@pytest.mark.parametrize(
    ("world_size", "num_workers", "message"),
    [
        (3, 1, "8 shards for 3 processes; expected a multiple"),
        (2, 5, "num_workers: got 5 in each of 2 processes, with 8 shards; expected at most 4"),
    ],
)
def test_shards_that_cannot_be_shared_out(world_size, num_workers, message, tmp_path, monkeypatch):
    write_shards(tmp_path)
    monkeypatch.setattr("visionssm.engine.stream.get_dist_info", lambda: (0, world_size))
    stream = ImageStream("wds/", "train", str(tmp_path), num_classes=48)
    with pytest.raises(UserError, match=message):
        stream.set_loader(4, num_workers)


@needs_webdataset
def test_fewer_shards_than_processes_in_validation(tmp_path, monkeypatch):
    """Every process says so, also those that would have one."""
    write_shards(tmp_path, shards=2)
    for rank in range(3):
        monkeypatch.setattr("visionssm.engine.stream.get_dist_info", lambda rank=rank: (rank, 3))
        with pytest.raises(UserError, match=r"split 'validation': 2 shards for 3 processes; expected at least one for each"):
            ImageStream("wds/", "validation", str(tmp_path), num_classes=48)


def test_repeated_augmentation(monkeypatch):
    data = list(range(600))

    def epoch(rank, number, seed=0):
        monkeypatch.setattr("visionssm.engine.samplers.get_dist_info", lambda: (rank, 4))
        sampler = RepeatedAugmentation(data, seed=seed)
        sampler.set_epoch(number)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    parts = [epoch(rank, 0) for rank in range(4)]
    together = sorted(index for part in parts for index in part)
    counts = np.bincount(together, minlength=600)
    assert len(together) == 512  # whole blocks of 256 images
    assert (counts == 3).sum() == 170
    assert (counts == 0).sum() == 600 - 171
    assert all(len(set(part)) == len(part) for part in parts)  # the repeats of an image are in different processes
    assert parts[0] == epoch(0, 0)
    assert len({tuple(epoch(0, *key)) for key in ((0, 0), (1, 0), (0, 1))}) == 3
