"""Compare explanation methods on trained classifiers: perturbation of test images, and agreement with object masks.

    python tools/evaluate_explain.py CHECKPOINT... --images FOLDER --masks FOLDER [--count N] [--csv FILE]
    python tools/evaluate_explain.py CHECKPOINT... --digits [--count N] [--csv FILE]
    python tools/evaluate_explain.py --table

CHECKPOINT is what `visionssm explain` takes; its rows replace those of the same model and data in the CSV file. `--images` is a
folder of class folders, of which the first N images, the same number of every class, are masked step by step. `--masks` is in
COCO's layout (annotations/instances_*.json and a folder per split): objects of the model's classes are cut out with a margin, made
as small as the model's images, and their polygons are the masks. `--digits` takes both from scikit-learn's handwritten digits: the
first N test images, and as masks their ink, half of full strength or more. `--table` prints the CSV as docs/explain.md shows it.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from visionssm import explain
from visionssm.commands.classifier import Classifier, load_classifier
from visionssm.errors import UserError

CSV = Path(__file__).parents[1] / "benchmarks" / "explain_evaluation.csv"
BATCH = 50
COCO_NAMES = {"automobile": "car", "ship": "boat"}  # where a class of ours has another name there
SMALLEST = 32  # pixels of an object's box
MARGIN = 0.25  # of the object's longer side, on either side
COVERED = (0.05, 0.9)  # share of the cut-out that is object
FIELDS = ("model", "data", "method", "positive_auc", "negative_auc", "pixel_accuracy", "mean_iou", "mean_ap", "seconds")


def methods(model: nn.Module) -> dict[str, Callable[[nn.Module, Tensor, Tensor | None], Tensor]]:
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
    y, x = (torch.linspace(-1, 1, side) for side in images.shape[-2:])
    return -(y[:, None].square() + x.square()).expand(len(images), -1, -1)


Batches = list[tuple[Tensor, Tensor]]
Cuts = list[tuple[Tensor, Tensor, int]]


def digits(classifier: Classifier, count: int) -> tuple[Batches, Cuts]:
    """Handwritten digits: batches of images and labels; images, their ink and labels."""
    from visionssm.engine.data import Digits  # needs the extra [train]

    dataset = Digits("test", classifier.data_config["input_size"][1:])
    dataset.transform = classifier.transform
    side = classifier.data_config["input_size"][1]
    cut = []
    for image, item in zip(dataset.images[:count], dataset, strict=False):
        grey = image.convert("L").resize((side, side), Image.Resampling.BICUBIC)
        cut.append((item["image"], torch.from_numpy(np.asarray(grey) > 127), item["label"]))
    images, labels = torch.stack([c[0] for c in cut]), torch.tensor([c[2] for c in cut])
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True)), cut


def test_images(classifier: Classifier, folder: Path, count: int) -> Batches:
    """Batches of images and labels, the same number of every class."""
    names = [classifier.name_of(i) for i in range(classifier.model.num_classes)]
    pairs = []
    for label, name in enumerate(names):
        files = sorted((folder / name).glob("*"))[: count // len(names)]
        if len(files) < count // len(names):
            raise UserError(f"--images: {folder / name}: {len(files)} images, expected {count // len(names)}")
        pairs += [(classifier.transform(Image.open(file).convert("RGB")), label) for file in files]
    images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def objects(classifier: Classifier, folder: Path) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut-outs of objects of the classifier's classes: image, mask (H, W), label."""
    names = [classifier.name_of(i) for i in range(classifier.model.num_classes)]
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


def evaluate(source: str, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row for every method; what it was measured on goes to stdout."""
    classifier = load_classifier(source)
    model, name = classifier.model, classifier.model.pretrained_cfg["architecture"]
    if arguments.digits:
        data, (loader, cut) = "digits", digits(classifier, arguments.count)
    else:
        data, loader = arguments.images.parent.name, test_images(classifier, arguments.images, arguments.count)
        cut = list(objects(classifier, arguments.masks))
    pictures, shapes, labels = (torch.stack([torch.as_tensor(c[i]) for c in cut]) for i in range(3))
    with torch.no_grad():
        right = sum((model(x.to(classifier.device)).argmax(1).cpu() == y).sum().item() for x, y in loader)
        right_cut = (model(pictures.to(classifier.device)).argmax(1).cpu() == labels).sum().item()
    total = sum(len(y) for _, y in loader)
    print(f"{classifier.description}\n{right} of {total} test images right; {right_cut} of {len(cut)} masked ones", flush=True)
    for method, compute in methods(model).items():
        torch.manual_seed(0)
        start = time.perf_counter()
        areas = [explain.perturbation_auc(model, loader, compute, mode).auc for mode in ("positive", "negative")]
        batches = zip(pictures.split(BATCH), shapes.split(BATCH), strict=True)
        scores = explain.segmentation_scores(model, batches, compute)
        values = (*areas, scores.pixel_accuracy, scores.mean_iou, scores.mean_ap, time.perf_counter() - start)
        print(f"{name}  {data}  {method}  {'  '.join(f'{v:.3f}' for v in values)}", flush=True)
        yield dict(zip(FIELDS, (name, data, method, *(f"{v:.4f}" for v in values)), strict=True))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(path: Path) -> list[str]:
    """The CSV as lines of Markdown, in percent, the best of every column and model in bold."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
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
    """Parse, measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--masks", type=Path, metavar="FOLDER")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="images to perturb; default: 200")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true", help="print the CSV as Markdown")
    args = parser.parse_args()
    if args.table:
        print(*table(args.csv), sep="\n")
        return 0
    if not (args.checkpoints and (args.digits or (args.images and args.masks))):
        parser.error("expected checkpoints with --images and --masks or with --digits, or --table")
    try:
        rows = [row for source in args.checkpoints for row in evaluate(source, args)]
    except UserError as error:
        print(f"evaluate_explain: {error}", file=sys.stderr)
        return 1
    measured = {(row["model"], row["data"]) for row in rows}
    rows = [row for row in read(args.csv) if (row["model"], row["data"]) not in measured] + rows
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
