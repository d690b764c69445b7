"""Scenes of scikit-learn's handwritten digits, as files for detectors and segmentors: `python tools/draw_digit_scenes.py FOLDER`.

FOLDER gets {train,val}/*.png, annotations/instances_{train,val}.json with boxes and masks in COCO's format, and
semantic/{train,val}/*.png, 0 for the background and 1 for a digit. No digit is in scenes of both splits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 96  # pixels of a scene
SCENES = {"train": 400, "val": 50}


def main() -> None:
    """Draw the scenes unless they lie there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if all((folder / "annotations" / f"instances_{split}.json").exists() for split in SCENES):
        return
    digits, labels = load_digits(return_X_y=True)
    glyphs = (digits.reshape(-1, 8, 8) / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    first = int(0.8 * len(labels))
    for split, (start, end) in {"train": (0, first), "val": (first, len(labels))}.items():
        write(folder, split, glyphs[start:end], labels[start:end], rng)


def write(folder: Path, split: str, glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one split's scenes and write its files."""
    for place in (folder / split, folder / "semantic" / split, folder / "annotations"):
        place.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(SCENES[split]):
        image, semantic, objects = scene(glyphs, labels, rng)
        name = f"{number:04}.png"
        Image.fromarray(image).save(folder / split / name)
        Image.fromarray(semantic).save(folder / "semantic" / split / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for label, mask in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, **geometry(mask)})
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def scene(glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list]:
    """An image `(SIDE, SIDE, 3)` uint8, its semantic map, and the label and the mask of each digit; digits do not overlap."""
    shade = rng.integers(0, 90, 3)
    image = np.clip(shade + rng.normal(0, 8, (SIDE, SIDE, 3)), 0, 255)
    semantic = np.zeros((SIDE, SIDE), np.uint8)
    objects = []
    for _ in range(rng.integers(2, 7)):
        index, size = rng.integers(len(labels)), int(rng.integers(30, 45))
        top, left = rng.integers(0, SIDE - size, 2)
        window = np.s_[top : top + size, left : left + size]
        if semantic[window].any():
            continue
        stroke = np.asarray(Image.fromarray(glyphs[index]).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
        image[window] = (1 - stroke) * image[window] + stroke * rng.integers(130, 256, 3)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[window] = stroke[..., 0] > 0.3
        semantic[mask] = 1
        objects.append((int(labels[index]), mask))
    return image.astype(np.uint8), semantic, objects


def geometry(mask: np.ndarray) -> dict[str, object]:
    """COCO's box, area and run-length encoded mask; runs go down the columns and begin with zeros."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes]))
    return {
        "bbox": [int(x) for x in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [SIDE, SIDE], "counts": [int(x) for x in counts]},
    }


if __name__ == "__main__":
    main()
