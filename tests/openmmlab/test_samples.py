"""A data set in memory, inside mmdet's wrappers."""

import numpy as np
import torch
from mmengine.registry import DATASETS, MODELS, DefaultScope

from visionssm.engine.config import load_config


def test_samples_are_made_once_and_stay_as_they_are(digit_scenes, monkeypatch):
    import mmdet.datasets
    import mmdet.models  # noqa: F401

    cfg = load_config("detection/mask-rcnn_vmamba-nano_fpn_digit-scenes", {"data_root": str(digit_scenes)})
    config = {**cfg.train_dataloader.dataset, "indices": 3}
    with DefaultScope.overwrite_default_scope("mmdet"):
        plain = DATASETS.build(config)
        cached = DATASETS.build({"type": "visionssm.CachedSamples", "dataset": config})
        repeated = DATASETS.build(
            {"type": "RepeatDataset", "times": 4, "dataset": {"type": "visionssm.CachedSamples", "dataset": config}}
        )
        preprocessor = MODELS.build({"type": "DetDataPreprocessor", "pad_mask": True, "pad_size_divisor": 64})
    assert (len(cached), len(repeated), repeated.metainfo["classes"]) == (3, 12, tuple("0123456789"))
    made = []
    prepare = type(cached.inner).prepare_data
    monkeypatch.setattr(type(cached.inner), "prepare_data", lambda self, i: made.append(i) or prepare(self, i))
    for _ in range(3):
        for index in range(3):
            sample = cached[index]
            batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
            assert preprocessor(batch, training=True)["data_samples"][0].gt_instances.masks.height == 128  # padded, in its copy
    assert made == [0, 1, 2]
    for index in range(3):
        sample, expected = cached[index], plain[index]
        assert torch.equal(sample["inputs"], expected["inputs"])
        ours, theirs = (s["data_samples"].gt_instances for s in (sample, expected))
        assert torch.equal(ours.bboxes.tensor, theirs.bboxes.tensor)
        assert np.array_equal(ours.masks.masks, theirs.masks.masks)
        assert sample["data_samples"].metainfo.keys() == expected["data_samples"].metainfo.keys()
