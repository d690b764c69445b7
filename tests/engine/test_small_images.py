"""Images kept in memory, and batches augmented on the device."""

import pytest
import torch
from PIL import Image

from visionssm import config_path
from visionssm.engine import BatchAugmentation, CachedImages, ImageClassifier, ImageFolder
from visionssm.engine.config import load_config
from visionssm.engine.data import collate
from visionssm.engine.runner import Runner
from visionssm.errors import UserError

IMAGES = torch.randint(0, 256, (64, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_without_draws_nothing_changes():
    assert torch.allclose(BatchAugmentation(hflip=0.0)(IMAGES), IMAGES.float(), atol=1e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_mirrors_and_whole_shifts_keep_every_value(dtype):
    """The reference shifts and mirrors each image by indexing, and must find every image of the batch among its results."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        result = BatchAugmentation(shift=2, hflip=0.5)(IMAGES)
    padded = torch.nn.functional.pad(IMAGES.float(), [2] * 4, mode="replicate")
    padded[:, :, 2:-2, :2] = padded[:, :, 2:-2, 2:4].flip(3)  # the border pixel itself is mirrored too
    padded[:, :, 2:-2, -2:] = padded[:, :, 2:-2, -4:-2].flip(3)
    padded[:, :, :2] = padded[:, :, 2:4].flip(2)
    padded[:, :, -2:] = padded[:, :, -4:-2].flip(2)
    seen = set()
    for image, candidates in zip(result, padded, strict=True):
        windows = {
            (row, column, mirror): window.flip(2) if mirror else window
            for row in range(5)
            for column in range(5)
            for mirror in (False, True)
            for window in [candidates[:, row : row + 12, column : column + 16]]
        }
        matches = [key for key, window in windows.items() if torch.allclose(image, window, atol=1e-2)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {row for row, _, _ in seen} == {column for _, column, _ in seen} == set(range(5))
    assert {mirror for _, _, mirror in seen} == {False, True}


def test_a_share_of_the_images_is_distorted_within_range():
    torch.manual_seed(0)
    images = IMAGES.repeat(8, 1, 1, 1)
    result = BatchAugmentation(hflip=0.0, distort=0.5)(images)
    changed = ((result - images).abs() > 1e-2).flatten(1).any(1).float().mean().item()
    assert 0.4 < changed < 0.6
    assert result.min() >= 0
    assert result.max() <= 255


def test_saturation_and_contrast_of_a_grey_image():
    """Grey stays grey, and one that is the same all over keeps its value but for brightness."""
    torch.manual_seed(0)
    grey = torch.full((32, 3, 8, 8), 100, dtype=torch.uint8)
    result = BatchAugmentation(distort=1.0, colour=0.2)(grey)
    assert torch.allclose(result, result[:, :1, :1, :1].expand_as(result), atol=1e-3)
    assert 80 <= result.min() < 90
    assert 110 < result.max() <= 120


def test_a_rectangle_of_some_images_is_erased():
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 16), 300).float()  # brighter than any noise
    result = BatchAugmentation(erase=0.25).erased(images)
    erased = (result != 300).all(1)
    assert torch.equal(erased, (result != 300).any(1))  # all channels or none
    sizes = {(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in erased if mask.any()}
    assert all(mask.sum() == mask.any(1).sum() * mask.any(0).sum() for mask in erased)  # every one a rectangle
    assert {max(rows for rows, _ in sizes), max(columns for _, columns in sizes)} <= {14, 15, 16, 6, 7, 8}
    assert 0.15 < erased.flatten(1).any(1).float().mean() < 0.3
    assert erased[:, -4:, -2:].any()  # in every corner
    assert erased[:, :4, :2].any()
    noise = result[erased.unsqueeze(1).expand_as(result)]
    assert noise.min() < 5
    assert 250 < noise.max() <= 255


def test_erasing_is_part_of_the_augmentation():
    torch.manual_seed(0)
    white = torch.full((32, 3, 16, 16), 255, dtype=torch.uint8)
    erased, kept = (BatchAugmentation(hflip=0.0, erase=erase)(white) for erase in (1.0, 0.0))
    assert (kept > 254).all()
    assert (erased < 250).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"erase": 1.5}, "erase: got 1.5, expected 0 to 1"),
        ({"shift": -1}, "shift: got -1, expected 0 to inf"),
        ({"hflip": 1.5}, "hflip: got 1.5, expected 0 to 1"),
        ({"rotation": 200}, "rotation: got 200, expected 0 to 180"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(UserError, match=f"model.batch_augmentation.{message}"):
        BatchAugmentation(**arguments)


def test_unknown_argument_names_the_nearest():
    with pytest.raises(UserError, match=r"model.batch_augmentation.shfit: .*did you mean shift"):
        ImageClassifier({"model_name": "vim_nano"}, batch_augmentation={"shfit": 2})


def test_only_training_augments():
    model = ImageClassifier({"model_name": "vim_nano", "num_classes": 2}, batch_augmentation={"shift": 4})
    data = {"images": IMAGES, "labels": torch.zeros(64, dtype=torch.int64)}
    tested, trained = (model.data_preprocessor(data, training)["images"] for training in (False, True))
    plain = ImageClassifier({"model_name": "vim_nano", "num_classes": 2}).data_preprocessor(data, True)["images"]
    assert torch.equal(tested, plain)
    assert not torch.equal(trained, plain)


@pytest.fixture
def cached(photographs):
    inner = {"type": "visionssm.ImageFolder", "split": "train", "transform": {"no_aug": True}}
    (photographs / "train" / "dark" / "3.jpg").write_bytes(b"no image")
    return CachedImages(inner, str(photographs), 24), ImageFolder(str(photographs), "train", 24, {"no_aug": True})


def test_cached_images_are_those_of_the_data_set_inside(cached):
    cached, inner = cached
    assert (cached.metainfo, cached.split, cached.data_config) == (inner.metainfo, inner.split, inner.data_config)
    wanted = collate([inner[index] for index in range(len(inner))])
    for found in (cached.__getitems__(list(range(12))), collate([cached[index] for index in range(len(cached))])):
        assert torch.equal(found["images"], wanted["images"])
        assert torch.equal(found["labels"], wanted["labels"])
        assert found["unreadable"] == wanted["unreadable"]
    assert len(wanted["unreadable"]) == 1


def test_cached_images_are_decoded_by_workers_alike(cached, photographs):
    inner = {"type": "visionssm.ImageFolder", "split": "train", "transform": {"no_aug": True}}
    assert torch.equal(CachedImages(inner, str(photographs), 24, workers=1).images, cached[0].images)


def test_cifar10_recipes_share_everything_but_the_model():
    names = sorted(path.stem for path in config_path("vmamba-nano_cifar10").parent.glob("*-nano_cifar10.py"))
    assert len(names) == 6
    configs = [load_config(name).to_dict() for name in names]
    for cfg in configs:
        assert cfg["model"]["backbone"].pop("num_classes") == 10
        backbone = cfg["model"].pop("backbone")
        parameters = sum(p.numel() for p in ImageClassifier({**backbone, "num_classes": 10}).parameters())
        assert 0.9e6 < parameters <= 1.5e6
        assert cfg == configs[0]


def test_cifar10_recipe_trains_on_a_folder(tmp_path):
    for split in ("train", "test"):
        for index, name in enumerate("abcdefghij"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (25 * index, 255 - 25 * index, 100 * number)).save(folder / f"{number}.png")
    options = {
        "data_root": str(tmp_path / "data"),
        "train_dataloader.batch_size": 10,
        "train_dataloader.dataset.workers": 0,
        "test_dataloader.dataset.workers": 0,
        "val_dataloader.dataset.workers": 0,
        "train_cfg.max_epochs": 6,
        "model.backbone.depths": [1, 1, 1, 1],
    }
    cfg = load_config("vmamba-nano_cifar10", options)
    cfg.work_dir = str(tmp_path / "work")
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 12
