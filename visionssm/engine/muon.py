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
    """timm's Muon, its arguments, state and updates; matrices of a shape are made orthogonal as one stack (arXiv:2502.16982).

    That is for groups of parameters with `use_muon=True`, as OptimWrapperConstructor makes them, a convolution's kernel being a
    matrix `(out, in * height * width)`. Groups that leave the choice to timm, those with `algo="adamuon"` or
    `conv_mode="batched"`, and sharded ones are left to timm's own step. That step cannot go through torch.compile here.
    """

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; what `closure` gives."""
        groups = self.param_groups
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacked = [self._is_stacked(group) for group in groups]
        # Once an optimizer of that class has been made, torch calls the hooks around its step, as it has around this one.
        inherited = TimmMuon.step.__wrapped__ if getattr(TimmMuon.step, "hooked", False) else TimmMuon.step
        self.param_groups = [group for group, is_stacked in zip(groups, stacked, strict=True) if not is_stacked]
        try:
            inherited(self)
        finally:
            self.param_groups = groups
        for group, is_stacked in zip(groups, stacked, strict=True):
            if is_stacked:
                self._update(group)
        return loss

    def _is_stacked(self, group: dict[str, Any]) -> bool:
        if not group.get("use_muon") or group.get("use_fallback") or group["algo"] != "muon" or group["conv_mode"] != "flatten":
            return False
        # what a resumed run has chosen otherwise for a parameter stays so
        chosen = (self.state.get(parameter, {}).get("use_muon", True) for parameter in group["params"])
        return all(chosen) and not any(isinstance(parameter, DTensor) for parameter in group["params"])

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
        stacks: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, update in zip(parameters, updates, strict=True):
            alike = stacks.setdefault((parameter.shape, parameter.dtype, parameter.device), ([], []))
            alike[0].append(parameter)
            alike[1].append(update.flatten(1))
        coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
        options = {name: group[name] for name in ("eps", "safety_factor", "scale_eps")}
        for alike, matrices in stacks.values():
            stack = zeropower_via_newtonschulz(torch.stack(matrices), group["ns_steps"], coefficients, **options)
            scale = get_lr_scale(stack.shape[1:], group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
            changes = stack.to(alike[0].dtype).unflatten(2, alike[0].shape[1:]).unbind()
            torch._foreach_add_(alike, changes, alpha=-group["lr"] * scale)
