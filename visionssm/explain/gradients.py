"""Gradient-based baselines, by captum: what to compare hidden attention with."""

from typing import Any

import torch
from torch import Tensor, nn

from visionssm.errors import UserError, did_you_mean

from .class_attribution import check_target

GRADIENT_METHODS = {
    "gradient": ("Saliency", {}),
    "gradient_x_input": ("InputXGradient", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 20, "internal_batch_size": 64}),
}
"""Our names, captum's classes, and arguments that differ from captum's defaults."""


def gradients(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, method: str = "gradient_x_input", **options: Any
) -> Tensor:
    """A gradient-based attribution, summed over the channels of the image.

    Args:
        model: a classifier.
        images: `(batch, channels, H, W)`.
        target: the class, one for all images or one each `(batch,)`; None for the predicted one.
        method: "gradient" (magnitudes), "gradient_x_input" or "integrated_gradients" (20 steps from the image of zeros).
        **options: arguments for the `attribute` method of captum's class.

    Returns:
        `(batch, H, W)`, signed except for "gradient".

    Raises:
        UserError: captum is missing, an unknown method, a class that is not there.
    """
    if method not in GRADIENT_METHODS:
        raise UserError(
            f"method: got {method!r}, expected one of {', '.join(GRADIENT_METHODS)}{did_you_mean(str(method), GRADIENT_METHODS)}"
        )
    try:
        from captum import attr
    except ImportError:
        raise UserError(f"method: {method} needs captum: pip install 'visionssm[explain]'") from None
    name, defaults = GRADIENT_METHODS[method]
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        with torch.no_grad():
            chosen = check_target(model(images), target)
        arguments = {**defaults, **options}
        if arguments.get("internal_batch_size"):  # captum warns of one that does not hold every image once
            arguments["internal_batch_size"] = max(arguments["internal_batch_size"], len(images))
        attributed = getattr(attr, name)(model).attribute(images, target=chosen, **arguments)
    return attributed.detach().sum(1)
