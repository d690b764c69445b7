"""Top-k accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from visionssm.errors import UserError
from visionssm.registry import METRICS

from .data import IGNORED


@METRICS.register_module()
class TopK(BaseMetric):
    """Share of images, in percent, whose label is among the k highest scores: `top1`, `top5`.

    Images with the label `IGNORED` are left out. With fewer than k classes every image counts as right.

    Args:
        topk: the values of k.
        collect_device: "cpu" or "gpu", where the results of all processes meet.
    """

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu") -> None:
        super().__init__(collect_device=collect_device, prefix="accuracy")
        self.topk = tuple(topk)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Note the rank of each image's label: 0 when it has the highest score, None for an ignored image."""
        scores = torch.stack([sample["scores"] for sample in data_samples]).cpu()
        labels = data_batch["labels"].cpu()
        order = scores.argsort(dim=1, descending=True, stable=True)  # equal scores: the earlier class first
        ranks = (order == labels[:, None]).int().argmax(1)
        self.results += [None if label == IGNORED else rank for rank, label in zip(ranks.tolist(), labels.tolist(), strict=True)]

    def compute_metrics(self, results: list[int | None]) -> dict[str, float]:
        """Percentages over the images that could be read.

        Raises:
            UserError: none could be read.
        """
        ranks = torch.tensor([rank for rank in results if rank is not None])
        if len(ranks) == 0:
            raise UserError(f"data_root: none of the {len(results)} images to evaluate can be read")
        return {f"top{k}": 100 * (ranks < k).double().mean().item() for k in self.topk}
