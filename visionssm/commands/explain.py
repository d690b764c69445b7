"""`visionssm explain` and `visionssm erf`: pictures of what a model looks at."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.models import is_model
from torch import Tensor

from visionssm import explain
from visionssm.errors import UserError, did_you_mean, first_line
from visionssm.explain.gradients import GRADIENT_METHODS
from visionssm.explain.picture import show, unnormalised
from visionssm.explain.products import late_layer

from .classifier import Classifier, load_classifier
from .images import open_image
from .models import check_model
from .picture import new_figure, write_figure

METHODS = ("rollout", "attribution", "raw", *GRADIENT_METHODS)
NOISE_IMAGES = 8
SHARES = (0.2, 0.5, 0.9)  # of a receptive field's gradient
_SHOWN_SIDE = 160  # pixels


@dataclass(frozen=True)
class Explanation:
    """An image as the model sees it, the class, its probability, a map for it, and a map of every path of one layer."""

    path: Path
    image: Image.Image
    name: str
    probability: float
    heat: Tensor
    layer: int
    paths: list[tuple[str, Tensor]]


def check_method(method: str) -> None:
    """Refuse an unknown method, and one that needs what is not installed.

    Raises:
        UserError: either.
    """
    if method not in METHODS:
        raise UserError(f"--method: got {method!r}, expected one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if method in GRADIENT_METHODS and importlib.util.find_spec("captum") is None:
        raise UserError(f"--method: {method} needs captum: pip install 'visionssm[explain]'")


def explain_image(
    classifier: Classifier,
    path: Path,
    method: str = "rollout",
    target: int | None = None,
    layer: int | None = None,
    signed: bool = False,
) -> Explanation:
    """Explain one image.

    Args:
        classifier: the model.
        path: the image file.
        method: one of `METHODS`.
        target: the class to explain; None for the predicted one.
        layer: the layer whose paths are shown; "raw" shows its attention alone, "rollout" and "attribution" start there.
            None: the first of the late layers for the paths, each method's own default for the map.
        signed: draw "rollout", "raw" and the paths from the signed elements, as in the paper, and not from their magnitudes.

    Raises:
        UserError: not an image; no such class or layer; captum is missing.
    """
    config, model = classifier.data_config, classifier.model
    pixels = classifier.transform(open_image(path, channels=config["input_size"][0]))
    batch = pixels[None].to(classifier.device)
    with explain.record(model) as tape, torch.no_grad():
        scores = model(batch)[0].float().softmax(0)
    if not scores.isfinite().all():
        raise UserError(f"{path}: the model's output is not finite; its weights may be broken")
    if target is not None and not 0 <= target < len(scores):
        raise UserError(f"--class: {target} is out of range; the model has {len(scores)} classes, 0 to {len(scores) - 1}")
    shown = late_layer(tape) if layer is None else tape.check_layer(layer)
    index = int(scores.argmax()) if target is None else target
    attention, token = tape.attention(shown), tape.default_token
    parts = [attention.direction(k) if signed else attention.direction(k).magnitude() for k in range(len(attention.paths))]
    return Explanation(
        path,
        _enlarged(unnormalised(pixels, config["mean"], config["std"])),
        classifier.name_of(index),
        scores[index].item(),
        _map(tape, batch, method, index, layer, signed)[0],
        shown,
        [(part.paths[0], part.to_map(part.rows(token))[0]) for part in parts],
    )


def _map(tape: explain.Tape, batch: Tensor, method: str, target: int, layer: int | None, signed: bool) -> Tensor:
    if method == "rollout":
        return explain.rollout(tape, start_layer=layer or 0, magnitude=not signed)
    if method == "raw":
        start = None if layer is None else tape.check_layer(layer)
        return explain.raw(tape, start_layer=start, end_layer=None if start is None else start + 1, magnitude=not signed)
    if method == "attribution":
        return explain.attribution(tape.network, batch, target, start_layer=layer)
    return explain.gradients(tape.network, batch, target, method)


def draw_explanations(explanations: Sequence[Explanation], method: str, path: Path) -> None:
    """One row for each: the image, the map over it, and the map of every path.

    Raises:
        UserError: matplotlib is missing, the file cannot be written.
    """
    figure = new_figure(path, [e.path for e in explanations])
    columns = 2 + max(len(e.paths) for e in explanations)
    figure.set_size_inches(1.7 * columns, 1.95 * len(explanations))
    for row, e in zip(figure.subplots(len(explanations), columns, squeeze=False), explanations, strict=True):
        row[0].imshow(e.image)
        row[0].set_title(f"{e.name}, {e.probability:.0%}", fontsize=9, parse_math=False)
        show(e.image, e.heat, row[1], method)
        for axes, (name, heat) in zip(row[2:], e.paths, strict=False):
            show(e.image, heat, axes, f"layer {e.layer}, {name}")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
    write_figure(figure, path)


def _enlarged(image: Image.Image) -> Image.Image:
    """At least `_SHOWN_SIDE` pixels, so that a map over it is smooth."""
    factor = -(-_SHOWN_SIDE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image


def receptive_field(
    name_or_checkpoint: str,
    images: Sequence[Path],
    out: Path,
    size: int | None = None,
    untrained: bool = False,
    device: str | None = None,
) -> list[str]:
    """Draw the effective receptive field of a model.

    Args:
        name_or_checkpoint: as in `load_classifier`; a name without published weights gives a model with fresh weights.
        images: image files; noise without any.
        out: the picture.
        size: side of the images in pixels; None for the model's own.
        untrained: fresh weights in any case.
        device: "cpu" or "cuda"; None is cuda where there is a GPU.

    Returns:
        Lines that say what was drawn, and how much of the image holds how much of the field.

    Raises:
        UserError: as `load_classifier` and `new_figure`; not an image.
    """
    figure = new_figure(out, images)
    known = is_model(name_or_checkpoint.split(".")[0])
    if known and (untrained or not timm.get_pretrained_cfg(name_or_checkpoint).has_weights):
        check_model(name_or_checkpoint)
        torch.manual_seed(0)
        model = timm.create_model(name_or_checkpoint)
        classifier = Classifier(model, "fresh weights", _device(device))
    elif untrained:
        raise UserError("--untrained: expected a model's name, see visionssm list")
    else:
        classifier = load_classifier(name_or_checkpoint, device)
    batch = _batch(classifier, images, size)
    try:
        field = explain.effective_receptive_field(classifier.model, batch.to(classifier.device)).cpu()
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # more memory than there is, fewer pixels than a patch
        raise UserError(f"--size {size or 'of the model'}: {first_line(error)}") from error
    axes = figure.subplots()
    figure.set_size_inches(4, 4)
    axes.imshow(field.sqrt().numpy(), cmap="inferno")
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"{classifier.model.pretrained_cfg['architecture']}, {classifier.source}", fontsize=9, parse_math=False)
    write_figure(figure, out)
    height, width = field.shape
    of = f"{len(images)} images" if images else f"{NOISE_IMAGES} images of noise"
    lines = [f"{classifier.model.pretrained_cfg['architecture']} from {classifier.source}: {height} x {width} pixels, {of}"]
    lines += [
        f"  {share:.0%} of the gradient within {side:.0%} of the image's side"
        for share, side in zip(SHARES, _sides(field), strict=True)
    ]
    return [*lines, str(out)]


def _device(device: str | None) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; visionssm env says more")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _batch(classifier: Classifier, images: Sequence[Path], size: int | None) -> Tensor:
    channels, height, width = classifier.data_config["input_size"]
    height, width = (size or height), (size or width)
    if not images:
        return torch.randn(NOISE_IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0))
    transform = timm.data.create_transform(**{**classifier.data_config, "input_size": (channels, height, width)})
    return torch.stack([transform(open_image(path, channels)) for path in images])


def _sides(field: Tensor) -> list[float]:
    """The side of the smallest centred box, as a share of the image's, that holds each of `SHARES` of the field."""
    height, width = field.shape
    total, sides = field.sum(), []
    steps = max(height, width)
    inside = []
    for i in range(1, steps + 1):
        h, w = -(-height * i // steps), -(-width * i // steps)
        top, left = (height - h) // 2, (width - w) // 2
        inside.append((field[top : top + h, left : left + w].sum() / total).item())
    for share in SHARES:
        sides.append((1 + next(i for i, held in enumerate(inside) if held >= share - 1e-6)) / steps)
    return sides
