"""Repeated augmentation."""

import numpy as np
from mmengine.dist import get_dist_info
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset

from visionssm.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class RepeatedAugmentation(RepeatAugSampler):
    """Every image of an epoch comes several times, augmented anew, on different processes; an epoch has fewer images in turn.

    Source: "Augment your batch", https://arxiv.org/abs/1901.09335, as DeiT trains. Each of the epoch's images comes `num_repeats`
    times, and the epoch is as long as without repeats.

    Args:
        dataset: what is sampled.
        seed: shuffles the images together with the epoch; the same in every process.
        num_repeats: times that an image comes.
    """

    def __init__(self, dataset: Dataset, seed: int | None = None, num_repeats: int = 3) -> None:
        rank, world_size = get_dist_info()
        super().__init__(dataset, num_replicas=world_size, rank=rank, num_repeats=num_repeats)
        self.seed = seed or 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle by (seed, epoch): timm's sampler takes one number as both."""
        super().set_epoch(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))
