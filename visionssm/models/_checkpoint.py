"""What the families' checkpoint filters have in common: from a file's content to the weights of one model."""

from typing import Any

from torch import Tensor

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
