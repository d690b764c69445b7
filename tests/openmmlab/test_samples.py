"""A data set in memory, inside mmdet's wrappers."""

import json

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS, MODELS, DefaultScope


def coco(folder, images=3):
    """A COCO data set of noise with a box on each image; its config."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for i in range(images):
        cv2.imwrite(str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8))
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 50})
        box = [4 + i, 6, 20, 10]
        content["annotations"].append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 1,
                "bbox": box,
                "area": 200,
                "iscrowd": 0,
                "segmentation": [[5, 6, 24, 6, 24, 16]],
            }
        )
    (folder / "coco.json").write_text(json.dumps(content))
    return {
        "type": "CocoDataset",
        "metainfo": {"classes": ("thing",)},
        "data_root": str(folder),
        "ann_file": "coco.json",
        "data_prefix": {"img": ""},
        "pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "PackDetInputs"},
        ],
    }


def test_samples_are_made_once_and_stay_as_they_are(tmp_path, monkeypatch):
    import mmdet.datasets
    import mmdet.models  # noqa: F401

    config = coco(tmp_path)
    with DefaultScope.overwrite_default_scope("mmdet"):
        plain = DATASETS.build(config)
        cached = DATASETS.build({"type": "visionssm.CachedSamples", "dataset": config})
        repeated = DATASETS.build(
            {"type": "RepeatDataset", "times": 4, "dataset": {"type": "visionssm.CachedSamples", "dataset": config}}
        )
        preprocessor = MODELS.build({"type": "DetDataPreprocessor", "pad_mask": True, "pad_size_divisor": 32})
    assert (len(cached), len(repeated), repeated.metainfo["classes"]) == (3, 12, ("thing",))
    made = []
    prepare = type(cached.inner).prepare_data
    monkeypatch.setattr(type(cached.inner), "prepare_data", lambda self, i: made.append(i) or prepare(self, i))
    for _ in range(3):
        for index in range(3):
            sample = cached[index]
            batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
            assert preprocessor(batch, training=True)["data_samples"][0].gt_instances.masks.height == 64  # padded, in its copy
    assert made == [0, 1, 2]
    for index in range(3):
        sample, expected = cached[index], plain[index]
        assert torch.equal(sample["inputs"], expected["inputs"])
        ours, theirs = (s["data_samples"].gt_instances for s in (sample, expected))
        assert torch.equal(ours.bboxes.tensor, theirs.bboxes.tensor)
        assert np.array_equal(ours.masks.masks, theirs.masks.masks)
        assert sample["data_samples"].metainfo.keys() == expected["data_samples"].metainfo.keys()
