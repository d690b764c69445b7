"""How good a map is: masking pixels in its order, and agreement with a mask of the object.

Protocol of Chefer et al. (arXiv 2012.09838, section 4), which arXiv 2403.01590 follows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionssm.errors import UserError, did_you_mean

from .class_attribution import attribution
from .gradients import GRADIENT_METHODS, gradients
from .products import raw, rollout
from .recording import record

Method = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""`(model, images, target)` -> maps `(batch, h, w)` on any grid, larger where an image matters more."""

FRACTIONS = tuple(i / 10 for i in range(1, 10))
"""Of the pixels that are masked: 10 % to 90 %."""


@dataclass(frozen=True)
class Perturbation:
    """Top-1 accuracy after masking each of `fractions` of the pixels, all 0..1, and the mean height of that curve."""

    fractions: tuple[float, ...]
    accuracy: tuple[float, ...]
    auc: float


@dataclass(frozen=True)
class Segmentation:
    """Agreement of maps with masks, all 0..1."""

    pixel_accuracy: float
    mean_iou: float
    mean_ap: float


def method_named(name: str) -> Method:
    """The method of that name with its default arguments.

    Raises:
        UserError: an unknown name.
    """
    if name not in METHODS:
        raise UserError(f"method: got {name!r}, expected one of {', '.join(METHODS)}{did_you_mean(str(name), METHODS)}")
    return METHODS[name]


def perturbation_auc(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    method: str | Method,
    mode: str = "positive",
    explained: str = "predicted",
    fill: float = 0.0,
) -> Perturbation:
    """Mask the pixels in the order of their relevance and watch the accuracy fall.

    Pixels of equal relevance, such as all of a map that says nothing, are masked in a random order, the same at every call.

    Args:
        model: a classifier in eval mode.
        loader: gives `(images, labels)`, the images normalised.
        method: a name of `METHODS`, or a function of (model, images, target).
        mode: "positive" masks the most relevant pixels first (a low area is good), "negative" the least relevant (high is good).
        explained: the class that the map is made for, "predicted" or "label".
        fill: the value of a masked pixel; 0 is the mean colour of normalised images.

    Returns:
        The accuracy against the labels at 10 %, 20 %, ..., 90 %, and the area under it, divided by its width.

    Raises:
        UserError: an unknown method, mode or class to explain, no images, not one label for each, a label that is none of the
            model's classes.
    """
    for name, value, known in (("mode", mode, ("positive", "negative")), ("explained", explained, ("predicted", "label"))):
        if value not in known:
            raise UserError(f"{name}: got {value!r}, expected {' or '.join(known)}")
    compute = method_named(method) if isinstance(method, str) else method
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    correct, total = torch.zeros(len(FRACTIONS), device=device), 0
    for images, labels in loader:
        if labels.shape != images.shape[:1]:
            raise UserError(f"loader: expected labels ({len(images)},), one for each image, got {tuple(labels.shape)}")
        images, labels = images.to(device), labels.to(device)
        relevance = _maps(compute(model, images, labels if explained == "label" else None), images).flatten(1)
        order = _order(relevance, mode == "positive", generator)
        for i, fraction in enumerate(FRACTIONS):
            masked = images.flatten(2).clone()
            masked.scatter_(2, order[:, None, : round(fraction * order.shape[1])].expand(-1, images.shape[1], -1), fill)
            with torch.no_grad():
                logits = model(masked.view_as(images))
            if i == 0 and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
                raise UserError(f"loader: got labels from {labels.min()} to {labels.max()}, expected 0 to {logits.shape[1] - 1}")
            correct[i] += (logits.argmax(1) == labels).sum()
        total += len(images)
    if not total:
        raise UserError("loader: gave no images")
    accuracy = correct.cpu() / total
    area = torch.trapezoid(accuracy, torch.tensor(FRACTIONS)) / (FRACTIONS[-1] - FRACTIONS[0])
    return Perturbation(FRACTIONS, tuple(accuracy.tolist()), area.item())


def segmentation_scores(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], method: str | Method) -> Segmentation:
    """How well maps of the predicted class separate the object from the rest.

    A map is scaled to 0..1; what lies above its mean is taken for the object.

    Args:
        model: a classifier in eval mode.
        loader: gives `(images, masks)`, masks `(batch, H, W)` of bool, True on the object, with both in every mask.
        method: as in `perturbation_auc`.

    Returns:
        The share of pixels on the right side; the mean over object and rest of intersection over union, summed over all images;
        and the mean over the images of the average precision of the map as a ranking of the object's pixels.

    Raises:
        UserError: an unknown method, masks of another size or kind, no images.
    """
    compute = method_named(method) if isinstance(method, str) else method
    device = next(model.parameters()).device
    right = total = images_seen = precision = 0.0
    intersection, union = torch.zeros(2), torch.zeros(2)
    for images, masks in loader:
        if masks.dtype != torch.bool or masks.shape != (len(images), *images.shape[-2:]):
            expected = (len(images), *images.shape[-2:])
            raise UserError(f"loader: expected masks {expected} of bool, got {tuple(masks.shape)} of {masks.dtype}")
        images, masks = images.to(device), masks.to(device).flatten(1)
        if not (masks.any(1) & ~masks.all(1)).all():
            raise UserError("loader: gave a mask without object or without background")
        maps = scaled(_maps(compute(model, images, None), images)).flatten(1)
        found = maps > maps.mean(1, keepdim=True)
        right += (found == masks).sum().item()
        total += masks.numel()
        for i, (ours, theirs) in enumerate(((found, masks), (~found, ~masks))):
            intersection[i] += (ours & theirs).sum().item()
            union[i] += (ours | theirs).sum().item()
        precision += average_precision(maps, masks).sum().item()
        images_seen += len(images)
    if not images_seen:
        raise UserError("loader: gave no images")
    return Segmentation(right / total, (intersection / union).mean().item(), precision / images_seen)


def _maps(maps: Tensor, images: Tensor) -> Tensor:
    """A method's maps on the pixels of the images, at least float32, in which ranks and sums are exact.

    Raises:
        UserError: not one map `(h, w)` for every image, or one that is not finite.
    """
    if maps.dim() != 3 or len(maps) != len(images):
        raise UserError(f"method: gave maps {tuple(maps.shape)}, expected ({len(images)}, h, w)")
    if not maps.isfinite().all():
        raise UserError("method: gave a map that is not finite")
    return to_size(maps.to(torch.promote_types(maps.dtype, torch.float32)), images.shape[-2:])


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Of every row `(batch, n)`: the mean over the positives of the precision among all that score no less, `(batch,)`."""
    falling, order = scores.sort(dim=1, descending=True)
    hits = positive.gather(1, order).to(scores.dtype)
    retrieved = torch.searchsorted(-falling, -falling, right=True)  # equals are retrieved together
    precision = hits.cumsum(1).gather(1, retrieved - 1) / retrieved
    return (hits * precision).sum(1) / hits.sum(1)


def _order(relevance: Tensor, descending: bool, generator: torch.Generator) -> Tensor:
    """The indices that sort every row `(batch, n)`, equals in a random order of `generator`."""
    shuffled = torch.stack([torch.randperm(relevance.shape[1], generator=generator) for _ in relevance]).to(relevance.device)
    return shuffled.gather(1, relevance.gather(1, shuffled).argsort(dim=1, descending=descending, stable=True))


def to_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `(batch, h, w)` on the pixels of an image of `size` (H, W), bilinear; the grid is taken to span the whole image."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode="bilinear", align_corners=False).squeeze(1)


def scaled(maps: Tensor) -> Tensor:
    """Every map `(batch, H, W)` to 0..1; all 0 where nothing varies."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def _raw(model: nn.Module, images: Tensor, target: Tensor | None) -> Tensor:
    return raw(_recorded(model, images))


def _rollout(model: nn.Module, images: Tensor, target: Tensor | None) -> Tensor:
    return rollout(_recorded(model, images))


def _recorded(model: nn.Module, images: Tensor) -> object:
    with record(model) as tape, torch.no_grad():
        model(images)
    return tape


def _random(model: nn.Module, images: Tensor, target: Tensor | None) -> Tensor:
    return torch.rand(images[:, 0].shape, device=images.device)


def _gradient(name: str) -> Method:
    return lambda model, images, target: gradients(model, images, target, name)


METHODS: dict[str, Method] = {
    "raw": _raw,
    "rollout": _rollout,
    "attribution": attribution,
    **{name: _gradient(name) for name in GRADIENT_METHODS},
    "random": _random,
}
"""By name; "random" is what any method has to beat. Hidden attention knows no class but in "attribution"."""
