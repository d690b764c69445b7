"""Parameters and multiply-adds of detectors and segmentors beside the published ones: `python tools/count_dense.py -o FILE.csv`.

Detectors at 1280 x 800 with 1000 proposals and 100 masks (plain backbones at 1024 x 1024), segmentors at 2048 x 512 without the
cost of the auxiliary head, by the published rule of `visionssm.flops`. On the meta device: nothing is computed.
"""

import argparse
import csv
from pathlib import Path

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from visionssm.engine.config import load_config
from visionssm.flops import count_flops
from visionssm.recipes import recipes
from visionssm.weights import checkpoints

LOCAL = {  # of the LocalMamba paper's tables: parameters in millions, G multiply-adds
    "mask-rcnn_local-vmamba-tiny_fpn_1x_coco": (45, 291),
    "mask-rcnn_local-vmamba-small_fpn_1x_coco": (69, 414),
    "mask-rcnn_local-vim-tiny_vitdet_8xb8-lsj-100e_coco": (31, 403),
    "upernet_local-vim-tiny_8xb2-160k_ade20k-512x512": (36, 181),
    "upernet_local-vim-small_8xb2-160k_ade20k-512x512": (58, 297),
    "upernet_local-vmamba-tiny_8xb2-160k_ade20k-512x512": (57, 970),
    "upernet_local-vmamba-small_8xb2-160k_ade20k-512x512": (81, 1095),
}


class Parts(nn.Module):
    """The parts of a detector or segmentor one after the other, without what has no weights: proposals, NMS, RoIAlign."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.extract_feat(images)
        if not hasattr(self.model, "roi_head"):
            return [self.model.decode_head(maps)]
        roi = self.model.roi_head
        boxes = roi.bbox_head if isinstance(roi.bbox_head, nn.ModuleList) else [roi.bbox_head]
        masks = roi.mask_head if isinstance(roi.mask_head, nn.ModuleList) else [roi.mask_head]
        channels = maps[0].shape[1]
        outputs = [score for level in self.model.rpn_head(maps) for score in level]
        outputs += [output for head in boxes for output in head(images.new_zeros(1000, channels, 7, 7))]
        return outputs + [head(images.new_zeros(100, channels, 14, 14)) for head in masks]


def main() -> None:
    """Count all and write a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    output = parser.parse_args().output
    published = {**published_by_vmamba(), **LOCAL}
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["config", "input", "parameters, M", "published parameters, M", "multiply-adds, G", "published multiply-adds, G"]
        )
        for path in recipes():
            if path.parent.name in ("detection", "segmentation") and "nano" not in path.stem and "resnet" not in path.stem:
                writer.writerow(row(path, *published.get(path.stem, ("", ""))))
                file.flush()
    print(output.read_text())


def row(path: Path, parameters: object, macs: object) -> list[object]:
    """Build one model on the meta device and count it."""
    cfg = load_config(str(path))
    cfg.model.backbone.update(pretrained=False)
    with torch.device("meta"), DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    detector = path.parent.name == "detection"
    side = 640 if "640x640" in path.stem else 512
    size = (1024, 1024) if "vitdet" in path.stem else (800, 1280) if detector else (side, 4 * side)
    count = count_flops(Parts(model.to("meta")), (3, *size))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return [path.stem, f"{size[1]}x{size[0]}", f"{millions:.2f}", parameters, f"{count.macs / 1e9:.1f}", macs]


def published_by_vmamba() -> dict[str, tuple[object, object]]:
    """The figures in the table of published files, under the names of their configs."""
    found = {}
    for entry in [*checkpoints("*", "detection"), *checkpoints("*", "segmentation")]:
        short, reported = entry.model.replace("_", "-"), entry.reported
        tag = {"coco_mask_rcnn_1x": "1x", "coco_mask_rcnn_3x": "ms-crop-3x", "coco_mask_rcnn_1x_bs8": "8xb1-1x"}.get(entry.tag)
        size = "640x640" if entry.tag.endswith("640") else "512x512"
        name = f"mask-rcnn_{short}_fpn_{tag}_coco" if tag else f"upernet_{short}_8xb2-160k_ade20k-{size}"
        found[name] = (reported["params"].removesuffix("M"), reported["gflops"])
    return found


if __name__ == "__main__":
    main()
