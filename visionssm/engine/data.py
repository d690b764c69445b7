"""Data sets for classification: images through timm's readers and transforms, as dicts that mmengine's loops understand.

A sample is `{"image": uint8 (C, H, W), "label": int, "unreadable": tuple of paths}`; a batch has `images`, `labels` and all
its `unreadable` paths. Normalisation happens on the device (see ImagePreprocessor), and decoding too if that is wanted: then an
image is an EncodedImage, and a batch has `encoded` ones.
"""

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionssm.errors import UserError, did_you_mean, first_line
from visionssm.registry import DATASETS, FUNCTIONS

from .device_decode import DrawnView, EncodedImage, EncodedImages

IGNORED = -1  # the label of an image that could not be read: no metric counts it
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken files


class ImageDataset(Dataset):
    """What the data sets share: the split, the class names and timm's transform for that split."""

    def __init__(
        self, classes: Sequence[str], split: str, input_size: int | Sequence[int], transform: Mapping[str, Any] | None
    ) -> None:
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.metainfo = {"classes": tuple(classes)}
        self.split = split
        self.is_training = "train" in split
        self.data_config = {"input_size": (3, *size), **(transform or {})}
        for key in transform or {}:
            if key not in (known := signature(create_transform).parameters):
                raise UserError(f"transform.{key}: timm's create_transform has no such argument{did_you_mean(key, known)}")
        self.transform = create_transform(is_training=self.is_training, normalize=False, **self.data_config)

    def check_label(self, label: int | None) -> None:
        """See that a label that a file holds is that of a class.

        Raises:
            UserError: it is none.
        """
        classes = len(self.metainfo["classes"])
        if label is None or not 0 <= label < classes:
            raise UserError(f"dataset: the split {self.split!r} has the label {label}, expected 0 to {classes - 1}")


@DATASETS.register_module()
class Digits(ImageDataset):
    """1,797 real handwritten digits of 43 people, 8 x 8 pixels, which scikit-learn ships (UCI optdigits, test part).

    Args:
        split: "train" (1,437 images) or "test" (360 images): a fixed split with equal shares of each class.
        input_size: side of the upscaled image, or (height, width).
        transform: further arguments of `timm.data.create_transform`.

    Raises:
        UserError: an unknown split.
    """

    def __init__(self, split: str, input_size: int | Sequence[int] = 32, transform: Mapping[str, Any] | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise UserError(f"split: got {split!r}, expected 'train' or 'test'")
        super().__init__([str(digit) for digit in range(10)], split, input_size, transform)
        images, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        chosen = train if split == "train" else test
        grey = np.round(images[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        self.images = [Image.fromarray(image).convert("RGB") for image in grey]
        self.labels = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(self.images[index]), "label": self.labels[index], "unreadable": ()}


class IndexedImages(ImageDataset):
    """Images that one of timm's readers finds by index.

    An image that cannot be decoded is replaced in training by the next one that can; in the other splits it keeps its
    place as a black image with the label `IGNORED`. Either way its name travels with the batch, to be counted.

    With `decode="device"` the loader's workers leave JPEG files as they are, see device_decode.py; other files are decoded here.
    """

    reader: Reader
    place: str  # where the images lie, for messages

    def __init__(
        self,
        classes: Sequence[str],
        split: str,
        input_size: int | Sequence[int],
        transform: Mapping[str, Any] | None,
        decode: str,
    ) -> None:
        super().__init__(classes, split, input_size, transform)
        if decode not in ("worker", "device"):
            raise UserError(f'dataset.decode: got {decode!r}, expected "worker" or "device"')
        if decode == "device" and not self.is_training:
            raise UserError(f'dataset.decode: expected "worker" for the split {split!r}: "device" is for training')
        self.drawn_view = DrawnView(self.transform) if decode == "device" else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        unreadable = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            image, label = self.read(candidate)
            if image is not None:
                self.check_label(label)
                image = image if isinstance(image, EncodedImage) else self.transform(image)
                return {"image": image, "label": label, "unreadable": tuple(unreadable)}
            unreadable.append(self.file_name(candidate))
            if not self.is_training:
                _, height, width = self.data_config["input_size"]
                return {
                    "image": torch.zeros(3, height, width, dtype=torch.uint8),
                    "label": IGNORED,
                    "unreadable": tuple(unreadable),
                }
        raise UserError(f"data_root: none of the {len(self)} images in {self.place} can be read")

    def read(self, index: int) -> tuple[Image.Image | EncodedImage | None, int]:
        """The RGB image, or None where it cannot be decoded, and its label."""
        try:
            file, label = self.opened(index)
            with file:
                if self.drawn_view:
                    return self.drawn_view(file, self.file_name(index)), label
                return Image.open(file).convert("RGB"), label
        except _DECODE_ERRORS:
            return None, IGNORED

    def opened(self, index: int) -> tuple[BinaryIO, int]:
        """The image's file, and its label."""
        return self.reader[index]

    def file_name(self, index: int) -> str:
        """What to call an image in the list of unreadable ones."""
        return self.reader.filename(index, absolute=True)


@DATASETS.register_module()
class ImageFolder(IndexedImages):
    """Images in `data_root/<split>/<class>/`, read by timm's folder reader.

    Args:
        data_root: folder with one subfolder per split.
        split: name of the subfolder; a name with "train" in it gets training transforms.
        input_size: side of the image that the model sees, or (height, width).
        transform: further arguments of `timm.data.create_transform`.
        class_map: a text file with the folder of one class a line, in the order of the labels; by default that of the names in
            `data_root/train`.
        decode: "worker", or "device" for JPEG files of a training split: a worker then only reads them, and crop and mirror image
            are all that `transform` may ask for.

    Raises:
        UserError: no data root, a missing or empty folder, a class that the training split or the map does not know.
    """

    def __init__(
        self,
        data_root: str | None,
        split: str,
        input_size: int | Sequence[int] = 224,
        transform: Mapping[str, Any] | None = None,
        class_map: str | None = None,
        decode: str = "worker",
    ) -> None:
        if data_root is None:
            raise UserError("data_root: none given; add --cfg-options data_root=FOLDER")
        root = Path(data_root).expanduser()
        folder = root / split
        if not folder.is_dir():
            what = f"holds {', '.join(_subfolders(root)) or 'no folders'}" if root.is_dir() else "no such folder"
            raise UserError(f"data_root: {root}: {what}; expected the split {split!r} in it, as {split}/<class>/<image>")
        # the training split defines the class indices: another split may lack a class
        train = root / "train"
        classes = read_class_map(class_map) if class_map else _subfolders(train if train.is_dir() else folder)
        unknown = sorted(set(_subfolders(folder)) - set(classes))
        if unknown:
            raise UserError(f"data_root: {folder} holds classes that {class_map or train} lacks: {', '.join(unknown[:5])}")
        for name in _subfolders(folder):
            if nested := _subfolders(folder / name):
                raise UserError(f"data_root: {folder / name} holds folders ({nested[0]}); images must lie directly in it")
        super().__init__(classes, split, input_size, transform, decode)
        self.folder = folder
        indices = {name: index for index, name in enumerate(classes)}
        try:
            self.reader = create_dataset("", root=str(folder), search_split=False, class_map=indices).reader
        except RuntimeError as error:  # timm found no file with the name of an image
            kinds = ", ".join(get_img_extensions())
            raise UserError(f"data_root: no images in {folder}/<class>/; files looked for: {kinds}") from error

    @property
    def place(self) -> str:
        """The split's folder."""
        return str(self.folder)


@DATASETS.register_module()
class HubImages(IndexedImages):
    """A data set of the Hugging Face hub, or a folder that their `datasets` package reads, through timm's reader.

    Args:
        name: `owner/name` on the hub, or a local folder, with parquet files for instance.
        split: as the data set calls it; a name with "train" in it gets training transforms.
        data_root: folder for what is downloaded; None takes the package's own.
        input_size: side of the image that the model sees, or (height, width).
        transform: further arguments of `timm.data.create_transform`.
        input_key: the column with the images.
        target_key: the column with the labels; its feature names the classes.
        decode: "worker", or "device" for JPEG files of a training split: a worker then only reads them, and crop and mirror image
            are all that `transform` may ask for.

    Raises:
        UserError: the package is missing, or it refuses the name, the split or a column.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_root: str | None = None,
        input_size: int | Sequence[int] = 224,
        transform: Mapping[str, Any] | None = None,
        input_key: str = "image",
        target_key: str = "label",
        decode: str = "worker",
    ) -> None:
        require_package("datasets", f"hub data set {name}")
        self.name = name
        try:
            options = {"root": data_root, "split": split, "input_key": input_key, "target_key": target_key}
            self.reader = create_dataset(f"hfds/{name}", **options).reader
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"dataset.name: {name}, split {split!r}: {first_line(error)}") from error
        columns = self.reader.dataset.column_names
        for argument, column in (("input_key", input_key), ("target_key", target_key)):
            if column not in columns:
                near = did_you_mean(column, columns) or f"; it has {', '.join(columns)}"
                raise UserError(f"dataset.{argument}: {name} has no column {column!r}{near}")
        indices = self.reader.class_to_idx
        if not indices:
            raise UserError(f"dataset.target_key: column {target_key!r} of {name} does not name its classes")
        super().__init__(sorted(indices, key=indices.get), split, input_size, transform, decode)

    def opened(self, index: int) -> tuple[BinaryIO, int]:
        """The image's file, and its label.

        Raises:
            OSError: the row has no image.
        """
        try:
            return super().opened(index)
        except (TypeError, AssertionError) as error:  # how timm's reader meets it
            raise OSError(f"{self.place}[{index}]: no image") from error

    def file_name(self, index: int) -> str:
        """The file's name, where the data set has kept it, and the index."""
        image = self.reader.dataset[index][self.reader.image_key] or {}
        return f"{self.place}[{index}] {image.get('path') or ''}".rstrip()

    @property
    def place(self) -> str:
        """The data set's name and split."""
        return f"{self.name}/{self.split}"


@DATASETS.register_module()
class CachedImages(Dataset):
    """Another data set's images, decoded once and kept in memory: for small images, of which a GPU takes many thousands a second.

    What is drawn anew in each epoch is then left to `model.batch_augmentation`, so the data set inside should draw nothing
    (`transform.no_aug` of timm's training transforms). A batch is taken in one step and needs no collating:
    `collate_fn=dict(type="visionssm.whole_batch")`, and no workers.

    Args:
        dataset: config of the data set inside.
        data_root: given on to it, unless it has one.
        input_size: likewise.
        workers: processes that decode.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        data_root: str | None = None,
        input_size: int | Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        shared = {"data_root": data_root, "input_size": input_size}
        inner = DATASETS.build({**{key: value for key, value in shared.items() if value is not None}, **dataset})
        if getattr(inner, "drawn_view", None):
            raise UserError('dataset.dataset.decode: expected "worker", as these images are decoded once and kept')
        self.metainfo, self.split, self.data_config = inner.metainfo, inner.split, inner.data_config
        loader = DataLoader(inner, batch_size=256, num_workers=workers, collate_fn=_stacked, worker_init_fn=init_worker)
        self.images = torch.empty(len(inner), *inner.data_config["input_size"], dtype=torch.uint8)
        self.labels = torch.empty(len(inner), dtype=torch.int64)
        self.unreadable: dict[int, tuple[str, ...]] = {}
        begin = 0
        for images, labels, unreadable in loader:
            end = begin + len(labels)
            self.images[begin:end], self.labels[begin:end] = images, labels
            self.unreadable |= {begin + index: paths for index, paths in enumerate(unreadable) if paths}
            begin = end

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index]), "unreadable": self.unreadable.get(index, ())}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor | list[str]]:
        """A whole batch, as `collate` makes it."""
        unreadable = [path for index in indices for path in self.unreadable.get(index, ())] if self.unreadable else []
        return {"images": self.images[indices], "labels": self.labels[indices], "unreadable": unreadable}


def _stacked(samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """One tensor for a batch of images: a worker hands each tensor over in a file of its own."""
    images, labels, unreadable = zip(*((sample["image"], sample["label"], sample["unreadable"]) for sample in samples), strict=True)
    return torch.stack(images), torch.tensor(labels), list(unreadable)


def require_package(package: str, purpose: str) -> None:
    """Refuse to go on without a package that only some data sets need.

    Raises:
        UserError: it is not installed.
    """
    if find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}")


def read_class_map(file: str) -> list[str]:
    """The class names in a text file, one a line.

    Raises:
        UserError: no such file, an empty one, or a name that comes twice.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_map: {file}: {first_line(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise UserError(f"class_map: {file}: {f'{twice[0]} comes twice' if twice else 'names no class'}")
    return names


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


@FUNCTIONS.register_module()
def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | list[str] | EncodedImages]:
    """Stack samples to `images (batch, C, H, W)` uint8, `labels (batch,)` int64, and a list of `unreadable` paths.

    Images that are to be decoded on the device come first, in `encoded`; `images` is missing if there are no others.
    """
    encoded = [sample for sample in samples if isinstance(sample["image"], EncodedImage)]
    decoded = [sample for sample in samples if not isinstance(sample["image"], EncodedImage)]
    batch = {
        "labels": torch.tensor([sample["label"] for sample in (*encoded, *decoded)]),
        "unreadable": [path for sample in samples for path in sample["unreadable"]],
    }
    if encoded:
        batch["encoded"] = EncodedImages.gathered([sample["image"] for sample in encoded])
    if decoded:
        batch["images"] = torch.stack([sample["image"] for sample in decoded])
    return batch


@FUNCTIONS.register_module()
def whole_batch(batch: dict[str, Tensor | list[str]]) -> dict[str, Tensor | list[str]]:
    """The batch as it is, for a data set that makes whole batches."""
    return batch


@FUNCTIONS.register_module()
def init_worker(worker_id: int) -> None:
    """Leave Ctrl-C to the main process, which stops the workers itself.

    The seeds stay those that the DataLoader derives from the main process's generator, which RandomnessHook seeds in every
    epoch; mmengine's own initialiser gives each epoch the same augmentations.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
