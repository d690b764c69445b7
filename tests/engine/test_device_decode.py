"""JPEG files that the device decodes: the same images as those of a worker, and the same promises."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import decode_jpeg

from visionssm import config_path
from visionssm.engine import ImageFolder, device_decode
from visionssm.engine.data import CachedImages, collate
from visionssm.engine.device_decode import EncodedImage, decode_batch
from visionssm.engine.launch import main_train
from visionssm.errors import UserError

CROPS = {"color_jitter": None, "scale": (0.3, 1.0)}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def waves(tmp_path):
    """Eight smooth colour images of several sizes in one class, none of whose chroma is subsampled: decoders differ in that."""
    folder = tmp_path / "waves" / "train" / "wave"
    folder.mkdir(parents=True)
    for index in range(8):
        rows, columns = np.mgrid[: 70 + 9 * index, : 150 - 11 * index]
        phases = [rows / (5 + index) + columns / 7, rows / 4 - columns / (6 + index), rows / 9 + index]
        pixels = np.stack([128 + 100 * np.sin(phase) for phase in phases], axis=-1).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=95, subsampling=0)
    return tmp_path / "waves"


def without_quantization_tables(file):
    """A JPEG file whose header is whole and whose pixels nobody can decode; nvJPEG would make noise of it."""
    data = file.read_bytes()
    while (begin := data.find(b"\xff\xdb")) >= 0:
        data = data[:begin] + data[begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big") :]
    file.write_bytes(data)


def samples(dataset, seed=0):
    """All samples, with the same draws for the same seed."""
    found = []
    for index in range(len(dataset)):
        random.seed(seed + index)
        torch.manual_seed(seed + index)
        found.append(dataset[index])
    return found


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_the_same_images_as_from_a_worker(interpolation, waves, device):
    """Crop, filter and mirror image alike; the decoders and their resizing round differently."""
    transform = {**CROPS, "interpolation": interpolation, "vflip": 0.5}
    worker, encoded = (
        collate(samples(ImageFolder(str(waves), "train", (48, 56), transform, decode=decode))) for decode in ("worker", "device")
    )
    assert set(encoded) == {"encoded", "labels", "unreadable"}
    assert {view.flips for view in encoded["encoded"].views} == {(), (2,), (3,), (3, 2)}
    images, labels = decode_batch(encoded, device)
    assert images.device.type == device.type
    assert images.dtype == torch.uint8
    assert images.shape == (8, 3, 48, 56)
    assert labels.tolist() == [0] * 8
    difference = (images.cpu().int() - worker["images"].int()).abs()
    assert difference.max() <= (3 if device.type == "cpu" else 6)
    assert difference.float().mean() < 0.6


def test_other_files_are_decoded_in_the_worker(photographs, device):
    """Grey, CMYK, RGB without conversion, PNG by its content, and a file with a tail are no work for the device."""
    folder = photographs / "train/bright"
    with Image.open(folder / "0.jpg") as image:
        image.convert("L").save(folder / "1.jpg")
        image.convert("CMYK").save(folder / "2.jpg")
        image.save(folder / "3.jpg", format="JPEG", keep_rgb=True)
        image.save(folder / "4.jpg", format="PNG")
    with (folder / "5.jpg").open("ab") as file:
        file.write(b"\0\0")
    dataset = ImageFolder(str(photographs), "train", 32, CROPS, decode="device")
    found = samples(dataset)
    assert [isinstance(sample["image"], EncodedImage) for sample in found] == [True, *5 * [False], *6 * [True]]
    batch = collate(found)
    assert len(batch["images"]) == 5
    images, labels = decode_batch(batch, device)
    assert len(images) == 12
    bright = images.float().mean((1, 2, 3)) > 100
    assert torch.equal(bright.cpu(), labels == 0)
    assert labels.tolist() == [0, *6 * [1], *5 * [0]]  # what a worker has decoded comes last
    assert set(collate(found[1:6])) == {"images", "labels", "unreadable"}
    assert batch["unreadable"] == []


def test_broken_files(photographs, device, monkeypatch):
    """What a worker sees to be broken, and what only the decoder does: the next image stands in for either."""
    bright = sorted((photographs / "train/bright").glob("*.jpg"))
    bright[0].write_bytes(bright[0].read_bytes()[:-200])
    without_quantization_tables(bright[1])
    dark = sorted((photographs / "train/dark").glob("*.jpg"))
    broken = [file.read_bytes() for file in (bright[-1], dark[-1])]  # which damage a decoder refuses differs from one to the other

    def decode(files, *args):
        if any(bytes(file.tolist()) in broken for file in files):
            raise RuntimeError
        return decode_jpeg(files, *args)

    monkeypatch.setattr(device_decode, "decode_jpeg", decode)
    dataset = ImageFolder(str(photographs), "train", 32, CROPS, decode="device")
    batch = collate(samples(dataset))
    assert set(batch["unreadable"]) == {str(bright[0]), str(bright[1])}
    images, labels = decode_batch(batch, device)
    assert batch["unreadable"][-2:] == [str(file) for file in (bright[-1], dark[-1])]
    assert labels.tolist() == [*5 * [0], *6 * [1], 0]
    assert torch.equal(images[5], images[6])
    assert torch.equal(images[11], images[0])
    assert torch.equal((images.float().mean((1, 2, 3)) > 100).cpu(), labels == 0)
    with pytest.raises(UserError, match=r"none of the 1 images in a batch can be decoded, e\.g\. .*dark/5\.jpg"):
        decode_batch(collate(samples(dataset)[-1:]), device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_leaves_alone_what_queued_kernels_still_read(photographs):
    """Memory that Python has freed is not written to before the kernels that read it have run; nor is a batch by the next one."""
    device, dataset = torch.device("cuda"), ImageFolder(str(photographs), "train", (512, 512), CROPS, decode="device")
    batches = [collate(samples(dataset, seed)) for seed in range(4)]
    expected = []
    for batch in batches:
        expected.append(decode_batch(batch, device)[0].cpu())
        torch.cuda.synchronize()
    sums, copies = [], []
    for batch in batches:
        ones = torch.ones(2**28, dtype=torch.int8, device=device)
        torch.cuda._sleep(2 * 10**8)  # about a tenth of a second, in which the host runs ahead
        sums.append(ones.sum())
        del ones
        images, _ = decode_batch(batch, device)
        torch.cuda._sleep(2 * 10**8)
        copies.append(images.clone())
        del images
    assert [total.item() for total in sums] == 4 * [2**28]
    assert all(torch.equal(copy.cpu(), image) for copy, image in zip(copies, expected, strict=True))


TRAINING = """
_base_ = {base!r}
data_root = {root!r}
input_size = 32
model = dict(backbone=dict(model_name="test_resnet"))
train_cfg = dict(max_epochs=2, val_interval=1)
train_dataloader = dict(batch_size=4, num_workers=2, dataset=dict(decode="device", transform=dict(color_jitter=None)))
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
"""


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_training_repeats_itself_resumed_or_not_and_counts_what_is_broken(photographs, tmp_path, capsys):
    broken = [photographs / "train/bright/0.jpg", photographs / "train/dark/1.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    without_quantization_tables(broken[1])
    config = tmp_path / "decoding.py"
    config.write_text(TRAINING.format(base=str(config_path("vmamba-nano_imagefolder")), root=str(photographs)))

    def weights(name, *options, epoch=2):
        work = tmp_path / name
        assert main_train([str(config), "--work-dir", str(work), *options]) == 0, capsys.readouterr().err
        return torch.load(work / f"epoch_{epoch}.pth", weights_only=False)["state_dict"]  # the file was written by this test

    whole = weights("whole")
    listing = re.search(
        r"^2 images could not be read and were skipped: (.*unreadable\.txt)$", capsys.readouterr().out, re.MULTILINE
    )
    with open(listing[1], encoding="utf-8") as file:
        assert sorted(file.read().splitlines()) == sorted(map(str, broken))
    (tmp_path / "half").mkdir()
    (tmp_path / "half/epoch_1.pth").write_bytes((tmp_path / "whole/epoch_1.pth").read_bytes())
    resumed, other = weights("half", "--resume"), weights("other", "--cfg-options", "randomness.seed=1")
    assert "resuming from" in capsys.readouterr().out
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not all(torch.equal(other[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("split", "arguments", "message"),
    [
        ("train", {"decode": "gpu"}, 'dataset.decode: got \'gpu\', expected "worker" or "device"'),
        ("val", {}, "dataset.decode: expected \"worker\" for the split 'val'"),
        (
            "train",
            {"transform": {"auto_augment": "rand-m9-mstd0.5-inc1"}},
            "no image for RandAugment: set transform.auto_augment=None",
        ),
        ("train", {"transform": {}}, "no image for ColorJitter: .* transform.color_jitter=None"),
        ("train", {"transform": {"no_aug": True}}, "random resized crop in transform, got Resize"),
        ("train", {"transform": {**CROPS, "interpolation": "lanczos"}}, "transform.interpolation: .* got lanczos"),
    ],
)
def test_what_a_device_does_not_do(split, arguments, message, photographs):
    with pytest.raises(UserError, match=message):
        ImageFolder(str(photographs), split, 32, **{"transform": CROPS, "decode": "device", **arguments})


def test_images_in_memory_are_decoded_once(photographs):
    with pytest.raises(UserError, match=r'dataset\.dataset\.decode: expected "worker"'):
        CachedImages(
            {"type": "visionssm.ImageFolder", "split": "train", "transform": CROPS, "decode": "device"}, str(photographs), 32
        )


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_workers_hand_over_one_piece_of_memory(photographs):
    """What two workers read is what the main process reads."""
    dataset = ImageFolder(str(photographs), "train", 32, CROPS, decode="device")
    files = [file.read_bytes() for file in sorted((photographs / "train").glob("*/*.jpg"))]
    for number, batch in enumerate(DataLoader(dataset, batch_size=6, num_workers=2, collate_fn=collate)):
        assert batch["encoded"].data.numpy().tobytes() == b"".join(files[6 * number : 6 * number + 6])
        assert all(view.data == b"" for view in batch["encoded"].views)
