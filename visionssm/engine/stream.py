"""Data sets that are read in order: WebDataset shards, and Hugging Face sets in streaming mode."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info
from timm.data import create_dataset
from timm.data.readers.reader import Reader
from torch.utils.data import IterableDataset

from visionssm.errors import UserError, first_line, shortened
from visionssm.registry import DATASETS

from .data import ImageDataset, read_class_map, require_package


@DATASETS.register_module()
class ImageStream(ImageDataset, IterableDataset):
    """Images from shards, through timm's readers.

    In training every process and every worker reads shards of its own, in an order that depends on (seed, epoch); the length is the
    same in every process, so that an epoch ends everywhere at once. In the other splits every process reads its shards once, and
    every image counts once. A loader takes no sampler for it: `sampler=None`.

    Args:
        name: "wds/" for WebDataset shards in `data_root`, "hfids/NAME" for a data set of the Hugging Face hub, or a folder.
        split: a name from `data_root/_info.json` or the hub, or a pattern of shards such as "x-train-{0000..0063}.tar|51200", with
            the number of images behind the bar; a name with "train" in it is for training.
        data_root: folder of the shards, or for what is downloaded from the hub.
        num_classes: the labels are below this number; needed where there is no `class_map` and the hub names no classes.
        class_map: a text file with one class name a line, in the order of the labels.
        num_samples: images in the split, where neither the pattern nor `_info.json` says it.
        input_size: side of the image that the model sees, or (height, width).
        transform: further arguments of `timm.data.create_transform`.
        seed: of the order.
        shuffle_size: images from which the next is drawn.

    Raises:
        UserError: a missing package, shards that cannot be found, an unknown number of images or classes.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_root: str | None = None,
        num_classes: int | None = None,
        class_map: str | None = None,
        num_samples: int | None = None,
        input_size: int | Sequence[int] = 224,
        transform: Mapping[str, Any] | None = None,
        seed: int = 0,
        shuffle_size: int = 4096,
    ) -> None:
        kind, _, _ = name.partition("/")
        if kind not in ("wds", "hfids"):
            raise UserError(f"dataset.name: got {name!r}, expected 'wds/' or 'hfids/NAME'")
        require_package("webdataset" if kind == "wds" else "datasets", f"dataset.name {name}")
        if kind == "wds" and data_root is None:
            raise UserError("data_root: none given; add --cfg-options data_root=FOLDER")
        self.kind = kind
        self.rank, self.world_size = get_dist_info()
        training = "train" in split
        size_key = "sample_shuffle_size" if kind == "wds" else "shuffle_size"
        options = {"is_training": training, "num_samples": num_samples, "seed": seed, size_key: shuffle_size}
        try:
            self.reader: Reader = create_dataset(name, root=data_root, split=split, **options).reader
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise UserError(f"dataset {name}, split {split!r} in {data_root}: {first_line(error)}") from error
        if class_map:
            classes = read_class_map(class_map)
        elif num_classes:
            classes = [str(label) for label in range(num_classes)]
        else:
            classes = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        if not classes:
            raise UserError("dataset.num_classes: expected a number, as these labels have no names")
        super().__init__(classes, split, input_size, transform)
        self.seed = seed
        if not training:
            self._keep_own_shards()

    def _keep_own_shards(self) -> None:
        """Leave to this process its share of a split that is read once; timm's reader would cut it to equal lengths.

        Raises:
            UserError: fewer shards than processes.
        """
        if self.kind == "wds":
            info = self.reader.split_info
            if len(info.filenames) < self.world_size:
                shards = f"{len(info.filenames)} shards for {self.world_size} processes"
                raise UserError(f"dataset, split {self.split!r}: {shards}; expected at least one for each")
            info.filenames = tuple(info.filenames)[self.rank :: self.world_size]
            self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1

    def set_loader(self, batch_size: int, num_workers: int) -> None:
        """Take in what the loader does: an epoch's length and shares depend on it.

        Raises:
            UserError: a number of shards that cannot be shared out.
        """
        self.reader.batch_size = batch_size
        self.reader.set_loader_cfg(num_workers=num_workers)
        if not self.is_training or self.kind != "wds":
            return
        shards, world = len(self.reader.split_info.filenames), self.world_size
        if shards % world:
            raise UserError(f"train_dataloader.dataset: {shards} shards for {world} processes; expected a multiple")
        if shards < world * num_workers:
            what = f"got {num_workers} in each of {world} processes, with {shards} shards"
            raise UserError(f"train_dataloader.num_workers: {what}; expected at most {shards // world}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, and begin it afresh."""
        self.reader.set_epoch(epoch)
        self.reader.ds = None
        words = np.random.SeedSequence((self.seed, self.rank, epoch)).generate_state(1)
        self.reader.worker_seed = int(words[0])  # where no worker process brings one

    def __len__(self) -> int:
        """Images of this process in an epoch of training; of the whole split otherwise."""
        return len(self.reader) if self.is_training else self.reader.num_samples

    def _open(self) -> None:
        try:
            self.reader._lazy_init()
        except RuntimeError as error:  # as of more workers than shards
            raise UserError(f"dataset {self.split!r}: {first_line(error)}") from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped, empty = _Skipped(), True
        if self.kind == "wds" or self.reader.ds is None:
            self._open()
        if self.kind == "wds":
            self.reader.ds.pipeline.insert(-2, skipped.remember)
        logger = logging.getLogger(f"timm.data.readers.reader_{self.kind}")
        logger.addFilter(skipped)
        try:
            for image, label in self.reader:
                empty = False
                self.check_label(label)
                yield {"image": self.transform(image), "label": int(label), "unreadable": tuple(skipped.take())}
            if empty and self.is_training:
                raise UserError(
                    f"dataset: the split {self.split!r} has no image that can be read; skipped: {shortened(skipped.names)}"
                )
        finally:
            logger.removeFilter(skipped)


class _Skipped(logging.Filter):
    """Turns timm's warnings of broken samples into a list of their names: a pipeline reads one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.current = "a shard"

    def remember(self, source: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Note each sample's name on its way to the decoder."""
        for sample in source:
            self.current = f"{sample['__url__']}/{sample['__key__']}"
            yield sample

    def filter(self, record: logging.LogRecord) -> bool:
        if "error" in record.getMessage():
            self.names.append(self.current)
            return False
        return True

    def take(self) -> list[str]:
        """The names since the last call."""
        names, self.names = self.names, []
        return names
