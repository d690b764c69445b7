"""A detector's or a segmentor's data set that stays in memory."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from visionssm.registry import DATASETS


@DATASETS.register_module()
class CachedSamples(Dataset):
    """Another data set's samples, made once by its pipeline and kept: for few images, and a pipeline that draws nothing.

    Needs no workers, from which the bit masks of a batch would come one by one, in more time than they take to use.

    Args:
        dataset: config of the data set inside, mmdet's or mmseg's.
    """

    def __init__(self, dataset: Mapping[str, Any]) -> None:
        self.inner = DATASETS.build(dict(dataset))
        self.metainfo = self.inner.metainfo
        self.samples: dict[int, dict[str, Any]] = {}

    def full_init(self) -> None:
        """Read the annotations, as mmengine's wrappers ask for."""
        self.inner.full_init()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.samples:
            self.samples[index] = self.inner[index]
        return dict(self.samples[index])
