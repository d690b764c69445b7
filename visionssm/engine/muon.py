"""timm's Muon in fewer, larger steps: a small model's host would otherwise launch kernels for longer than its device trains."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Muon as TimmMuon
from timm.optim.muon import _COEFFICIENTS, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor
from torch.distributed.tensor import DTensor

from visionssm.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class Muon(TimmMuon):
    """timm's Muon, its arguments and its state; matrices of the same shape are made orthogonal as one stack (arXiv:2502.16982).

    That is for groups of parameters with `use_fallback=False`; a convolution's kernel is a matrix `(out, in * height * width)`.
    All others, those with `algo="adamuon"` or `conv_mode="batched"`, and sharded ones are left to timm's own step.
    """

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; what `closure` gives."""
        groups = self.param_groups
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.param_groups = [group for group in groups if not _is_stacked(group)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in filter(_is_stacked, groups):
            self._update(group)
        return loss

    @torch.no_grad()
    def _update(self, group: dict[str, Any]) -> None:
        """Momentum and weight decay of a group, then its matrices, shape by shape."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state |= {"use_muon": True, "momentum_buffer": torch.zeros_like(parameter)}
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        stacks: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, update in zip(parameters, updates, strict=True):
            alike = stacks.setdefault(parameter.shape, ([], []))
            alike[0].append(parameter)
            alike[1].append(update.flatten(1))
        coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
        options = {name: group[name] for name in ("eps", "safety_factor", "scale_eps")}
        for alike, matrices in stacks.values():
            stack = zeropower_via_newtonschulz(torch.stack(matrices), group["ns_steps"], coefficients, **options)
            scale = get_lr_scale(stack.shape[1:], group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
            changes = stack.to(alike[0].dtype).unflatten(2, alike[0].shape[1:]).unbind()
            torch._foreach_add_(alike, changes, alpha=-group["lr"] * scale)


def _is_stacked(group: dict[str, Any]) -> bool:
    plain = group.get("use_fallback") is False and group["algo"] == "muon" and group["conv_mode"] == "flatten"
    return plain and not any(isinstance(parameter, DTensor) for parameter in group["params"])
