"""Compare explanation methods on trained classifiers: perturbation of test images, and agreement with object masks.

    python tools/evaluate_explain.py MODEL... --images FOLDER --masks FOLDER [--count N] [--device cpu|cuda] [--out FOLDER]
    python tools/evaluate_explain.py --document

MODEL is what `visionssm explain` takes: a name with published weights or a checkpoint. `--images` is a folder of class folders,
whose sorted names are the classes; the first N images, the same number of every class, are masked step by step. `--masks` is in
COCO's layout (annotations/instances_*.json and a folder per split): objects of the model's classes are cut out with a margin, made
as small as the model's images, and their polygons are the masks. Two files are written: the scores, and what they were measured
on with the models' accuracies. `--document` fills their sections of docs/explain.md.
"""

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from document_sections import replace_sections
from machine import environment
from PIL import Image, ImageDraw
from torch import Tensor, nn

from visionssm import explain
from visionssm.commands.classifier import Classifier, load_classifier
from visionssm.errors import UserError

ROOT = Path(__file__).parents[1]
SCORES, MODELS = "explain_evaluation.csv", "explain_evaluation_models.csv"
BATCH = 500  # images on a GPU
BATCH_CPU = 50
COCO_NAMES = {"automobile": "car", "ship": "boat"}  # where a class of ours has another name there
SMALLEST = 32  # pixels of an object's box
MARGIN = 0.25  # of the object's longer side, on either side
COVERED = (0.05, 0.9)  # share of the cut-out that is object
FIELDS = ("model", "data", "method", "positive_auc", "negative_auc", "pixel_accuracy", "mean_iou", "mean_ap", "seconds")
MODEL_FIELDS = ("model", "weights", "data", "images", "images_right", "masks", "masks_right", "device", "torch")

Batches = list[tuple[Tensor, Tensor]]
Method = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def methods(model: nn.Module) -> dict[str, Method]:
    """What is compared, by the name in the table."""
    compared = {
        "raw": explain.METHODS["raw"],
        "raw, magnitudes": partial(_taped, explain.raw, magnitude=True),
        "rollout": explain.METHODS["rollout"],
        "rollout, magnitudes": partial(_taped, explain.rollout, magnitude=True),
        "attribution": explain.attribution,
        "attribution, all layers": partial(explain.attribution, start_layer=0),
    }
    if hasattr(model, "cls_token"):
        compared["rollout, as published"] = partial(
            _taped, explain.rollout, start_layer=len(model.layers) * 5 // 8, as_published=True
        )
        compared["attribution, as published"] = partial(explain.attribution, as_published=True)
    for name in ("gradient", "gradient_x_input", "integrated_gradients"):
        compared[name.replace("_", " ")] = explain.METHODS[name]
    return {**compared, "centre of the image": _centre, "random": explain.METHODS["random"]}


def _taped(function: Callable[..., Tensor], model: nn.Module, images: Tensor, target: Tensor | None, **options: object) -> Tensor:
    with explain.record(model) as tape, torch.no_grad():
        model(images)
    return function(tape, **options)


def _centre(model: nn.Module, images: Tensor, target: Tensor | None) -> Tensor:
    """Nothing of the image: the nearer to its centre, the more relevant."""
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in images.shape[-2:])
    return -(y[:, None].square() + x.square()).expand(len(images), -1, -1)


def class_names(classifier: Classifier, folder: Path) -> list[str]:
    """The names of the class folders, sorted: the order in which training on image folders numbers them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    classes = classifier.model.num_classes
    if len(names) != classes:
        raise UserError(f"--images: {folder} holds {len(names)} class folders, the model has {classes} classes")
    return names


def test_images(classifier: Classifier, folder: Path, names: list[str], count: int) -> tuple[Tensor, Tensor]:
    """Images and labels, the same number of every class."""
    pairs = []
    for label, name in enumerate(names):
        files = sorted((folder / name).glob("*"))[: count // len(names)]
        if not files or len(files) < count // len(names):
            raise UserError(f"--images: {folder / name}: {len(files)} images, expected {max(1, count // len(names))}")
        pairs += [(classifier.transform(Image.open(file).convert("RGB")), label) for file in files]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def objects(classifier: Classifier, folder: Path, names: list[str]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut-outs of objects of the classes `names`: image, mask (H, W), label."""
    labels = {COCO_NAMES.get(name, name): label for label, name in enumerate(names)}
    side = classifier.data_config["input_size"][1]
    for listing in sorted(folder.glob("annotations/instances_*.json")):
        content = json.loads(listing.read_text())
        categories = {c["id"]: c["name"] for c in content["categories"]}
        files = {i["id"]: folder / listing.stem.removeprefix("instances_") / i["file_name"] for i in content["images"]}
        for annotation in content["annotations"]:
            label = labels.get(categories[annotation["category_id"]])
            if label is None or annotation.get("iscrowd") or min(annotation["bbox"][2:]) < SMALLEST:
                continue
            image = Image.open(files[annotation["image_id"]]).convert("RGB")
            drawn = Image.new("L", image.size)
            for polygon in annotation["segmentation"]:
                ImageDraw.Draw(drawn).polygon(polygon, fill=255)
            box = _square(annotation["bbox"], image.size)
            small = drawn.crop(box).resize((side, side), Image.Resampling.BOX)
            mask = torch.from_numpy(np.asarray(small) > 127)
            if COVERED[0] <= mask.float().mean() <= COVERED[1]:
                yield classifier.transform(image.crop(box)), mask, label


def _square(box: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square around a COCO box with a margin, moved and if need be shrunk into the image."""
    x, y, width, height = box
    side = min(round(max(width, height) * (1 + 2 * MARGIN)), *size)
    left = min(max(round(x + width / 2 - side / 2), 0), size[0] - side)
    top = min(max(round(y + height / 2 - side / 2), 0), size[1] - side)
    return left, top, left + side, top + side


def evaluate(source: str, arguments: argparse.Namespace) -> tuple[dict[str, object], list[dict[str, object]]]:
    """What a model was evaluated on and its accuracies; the scores of every method."""
    classifier = load_classifier(source, arguments.device)
    model, name = classifier.model, classifier.model.pretrained_cfg["architecture"]
    batch = BATCH if classifier.device == "cuda" else BATCH_CPU
    names, data = class_names(classifier, arguments.images), arguments.images.parent.name

    def batches(*tensors: Tensor) -> Batches:
        return list(zip(*(m.to(classifier.device).split(batch) for m in tensors), strict=True))

    images, labels = test_images(classifier, arguments.images, names, arguments.count)
    pictures, masks, categories = zip(*objects(classifier, arguments.masks, names), strict=True)
    pictures, masks = torch.stack(pictures), torch.stack(masks)
    loader, masked = batches(images, labels), batches(pictures, masks)
    machine = environment(classifier.device)
    measured_on = {
        "model": name,
        "weights": Path(classifier.source).name,
        "data": data,
        "images": len(images),
        "images_right": right(model, loader),
        "masks": len(masks),
        "masks_right": right(model, batches(pictures, torch.tensor(categories))),
        "device": machine["device"],
        "torch": machine["torch"],
    }
    print(*measured_on.values(), flush=True)
    rows = []
    for method, compute in methods(model).items():
        row = {"model": name, "data": data, "method": method, **scores(model, loader, masked, compute)}
        print("  ".join(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)
        rows.append({field: f"{value:.4f}" if isinstance(value, float) else value for field, value in row.items()})
    return measured_on, rows


@torch.no_grad()
def right(model: nn.Module, loader: Batches) -> int:
    """How many images the model classifies rightly."""
    return int(sum((model(images).argmax(1) == labels).sum() for images, labels in loader))


def scores(model: nn.Module, loader: Batches, masked: Batches, compute: Method) -> dict[str, float]:
    """The scores of one method, whose maps are computed once, and the seconds that it took for them."""
    torch.manual_seed(0)
    start = time.perf_counter()
    maps, masked_maps = ([compute(model, images, None).cpu() for images, _ in data] for data in (loader, masked))
    seconds = time.perf_counter() - start

    def stored(maps: list[Tensor]) -> Method:
        remaining = iter(maps)
        return lambda model, images, target: next(remaining).to(images.device)

    areas = {f"{mode}_auc": explain.perturbation_auc(model, loader, stored(maps), mode).auc for mode in ("positive", "negative")}
    agreement = explain.segmentation_scores(model, masked, stored(masked_maps))
    return {**areas, **dataclasses.asdict(agreement), "seconds": seconds}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(path: Path, fields: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    """The rows into a CSV file, in place of those of the same model and data."""
    measured = {(row["model"], row["data"]) for row in rows}
    rows = [row for row in read(path) if (row["model"], row["data"]) not in measured] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def sections(folder: Path = ROOT / "benchmarks") -> dict[str, list[str]]:
    """What docs/explain.md shows of the files in `folder`: lines of Markdown by the name of the section."""
    models = []
    for row in read(folder / MODELS):
        share = int(row["images_right"]) / int(row["images"])
        models.append(
            f"- {row['model']}, weights {row['weights']}: right on {share:.1%} of {row['images']} test images of {row['data']} and"
            f" on {row['masks_right']} of {row['masks']} objects with masks. Measured on {row['device']}, torch {row['torch']}."
        )
    return {"models": models, "evaluation": table(read(folder / SCORES))}


def table(rows: list[dict[str, str]]) -> list[str]:
    """The scores as lines of Markdown, in percent, the best of every column and model in bold."""
    lines = [
        "| model, data | method | positive AUC (low) | negative AUC (high) | pixel accuracy | mIoU | mAP |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peers = [peer for peer in rows if (peer["model"], peer["data"]) == (row["model"], row["data"])]
        cells = []
        for field in FIELDS[3:8]:
            best = (min if field == "positive_auc" else max)(float(peer[field]) for peer in peers)
            text = f"{100 * float(row[field]):.1f}"
            cells.append(f"**{text}**" if float(row[field]) == best else text)
        lines.append(f"| {row['model']}, {row['data']} | {row['method']} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Parse, measure or fill the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--masks", type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="images to perturb; default: 2000")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", metavar="FOLDER", help="default: benchmarks")
    parser.add_argument("--document", action="store_true", help="fill the sections of docs/explain.md")
    args = parser.parse_args()
    if args.document:
        replace_sections(ROOT / "docs" / "explain.md", sections(args.out))
        return 0
    if not (args.models and args.images and args.masks):
        parser.error("expected models with --images and --masks, or --document")
    try:
        measured = [evaluate(source, args) for source in args.models]
    except UserError as error:
        print(f"evaluate_explain: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / SCORES, FIELDS, [row for _, rows in measured for row in rows])
    write(args.out / MODELS, MODEL_FIELDS, [row for row, _ in measured])
    return 0


if __name__ == "__main__":
    sys.exit(main())
