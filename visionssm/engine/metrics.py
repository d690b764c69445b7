"""Top-k accuracy, and metrics as they are shown."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric

from visionssm.errors import UserError
from visionssm.registry import METRICS

from .data import IGNORED


@METRICS.register_module()
class TopK(BaseMetric):
    """Share of images, in percent, whose label is among the k highest scores: `top1`, `top5`.

    Images with the label `IGNORED` are left out. With fewer than k classes every image counts as right.

    Args:
        topk: the values of k, whole numbers from 1.

    Raises:
        UserError: anything else.
    """

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__(prefix="accuracy")
        if not isinstance(topk, Sequence) or not topk or not all(type(k) is int and k > 0 for k in topk):
            raise UserError(f"topk: got {topk!r}, expected a list of whole numbers, at least 1, such as (1, 5)")
        self.topk = tuple(topk)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Note the rank of each image's label: 0 when it has the highest score, None for an ignored image."""
        scores = torch.stack([sample["scores"] for sample in data_samples]).cpu()
        labels = data_batch["labels"].cpu()
        order = scores.argsort(dim=1, descending=True, stable=True)  # equal scores: the earlier class first
        ranks = (order == labels[:, None]).int().argmax(1)
        self.results += [None if label == IGNORED else rank for rank, label in zip(ranks.tolist(), labels.tolist(), strict=True)]

    def evaluate(self, size: int) -> dict[str, float]:
        """The percentages over all processes, which may have seen different numbers of images.

        Args:
            size: images in the data set; what a sampler has added to give every process as many comes last and is left out.
        """
        parts = all_gather_object(self.results)
        absent = object()
        results = [rank for row in zip_longest(*parts, fillvalue=absent) for rank in row if rank is not absent]
        self.results = []
        return {f"{self.prefix}/{name}": value for name, value in self.compute_metrics(results[:size]).items()}

    def compute_metrics(self, results: list[int | None]) -> dict[str, float]:
        """Percentages over the images that could be read.

        Raises:
            UserError: none could be read.
        """
        ranks = torch.tensor([rank for rank in results if rank is not None])
        if len(ranks) == 0:
            raise UserError(f"data_root: none of the {len(results)} images to evaluate can be read")
        return {f"top{k}": 100 * (ranks < k).double().mean().item() for k in self.topk}


def in_percent(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under their bare names, all in percent: mmdet's COCO metrics, and no others here, come as shares of 1.

    Those of object sizes that do not occur, which COCO gives as -1, are left out.
    """
    scale = {name: 100 if name.startswith("coco/") else 1 for name in metrics}
    return {name.rsplit("/", 1)[-1]: float(value) * scale[name] for name, value in metrics.items() if value != -1}
