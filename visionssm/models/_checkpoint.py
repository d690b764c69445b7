"""From a checkpoint file's content to the weights of one model."""

import sys
from typing import Any

from torch import Tensor, nn

from visionssm.errors import UserError, shortened

_CONTAINERS = ("model", "state_dict")


def unwrap(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint file's content, under bare names.

    Args:
        state_dict: names to tensors, or a dict that holds it under `model` or `state_dict`; names may begin with `module.`, once or
            twice. If any name begins with `backbone.`, a detector's or segmentor's, only those are kept.

    Returns:
        Names to tensors, in the same order.
    """
    for container in _CONTAINERS:
        if isinstance(state_dict.get(container), dict):
            state_dict = state_dict[container]
    weights = {name.removeprefix("module.").removeprefix("module."): value for name, value in state_dict.items()}
    if any(name.startswith("backbone.") for name in weights):
        weights = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    return weights


def load_checkpoint(model: nn.Module, content: dict[str, Any]) -> None:
    """Load a published checkpoint, of whichever generation of key names, or one of ours, completely or not at all.

    Args:
        model: a model of this zoo.
        content: what `torch.load(file, weights_only=True)` returns, or a state dict.

    Raises:
        TypeError: `content` is no dict, or the model none of this zoo.
        UserError: the checkpoint is of another variant; the message lists a few missing, unexpected and misshapen parameters. A
            ValueError.
    """
    if not isinstance(content, dict):
        raise TypeError(f"content: expected a dict of a checkpoint file, got {type(content).__name__}")
    family = sys.modules[type(model).__module__]
    if not hasattr(family, "checkpoint_filter_fn"):
        raise TypeError(f"model: expected one of visionssm's models, got {type(model).__name__}")
    weights = family.checkpoint_filter_fn(content, model)
    own = model.state_dict()
    shapes = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in weights.items() if k in own and v.shape != own[k].shape]
    reasons = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of other shapes": shapes,
    }
    if any(reasons.values()):
        listing = "; ".join(f"{what} {shortened(names, 3)}" for what, names in reasons.items() if names)
        raise UserError(f"checkpoint: of another model than this {type(model).__name__}: {listing}")
    model.load_state_dict(weights, strict=True)
