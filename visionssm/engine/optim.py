"""Parameter groups, the same for every task."""

from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_weight_decay
from torch import nn

from visionssm.errors import UserError
from visionssm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OptimWrapperConstructor:
    """timm's weight-decay grouping: none for vectors, biases and what a model's `no_weight_decay()` names.

    Args:
        optim_wrapper_cfg: `type` and arguments of the OptimWrapper, with the `optimizer` in it.
        paramwise_cfg: must be empty; mmengine hands it over.

    Raises:
        UserError: a `paramwise_cfg` that is not empty.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if paramwise_cfg:
            raise UserError(
                f"optim_wrapper.paramwise_cfg: {', '.join(paramwise_cfg)}: the groups come from the model's no_weight_decay()"
            )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper for a model, or for one inside a distributed wrapper."""
        model = getattr(model, "module", model)
        cfg = dict(self.optim_wrapper_cfg)
        optimizer = dict(cfg.pop("optimizer"))
        optimizer["params"] = param_groups_weight_decay(
            model, optimizer.get("weight_decay", 0.0), no_weight_decay_list=no_weight_decay(model)
        )
        cfg.setdefault("type", "OptimWrapper")
        return OPTIM_WRAPPERS.build(cfg, default_args={"optimizer": OPTIMIZERS.build(optimizer)})


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names, from `model` down, of the parameters that any module in it excludes by `no_weight_decay()`."""
    names = set()
    for path, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            names |= {f"{path}.{name}" if path else name for name in module.no_weight_decay()}
    return names
