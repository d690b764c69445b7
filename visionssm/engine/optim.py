"""Parameter groups, the same for every task, and an optimizer wrapper that never waits for the device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from inspect import signature
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper as MMEngineOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from timm.models import group_parameters
from timm.optim import Muon as TimmMuon
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW

from visionssm.errors import UserError, did_you_mean
from visionssm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

from .dense import backbone_autocast, is_detector
from .distributed import unwrapped

DTYPES = ("float16", "bfloat16")


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(MMEngineOptimWrapper):
    """mmengine's, with mixed precision on any device and without waiting for the device to log the gradients' norm.

    Args:
        optimizer: the optimizer.
        dtype: "bfloat16" or "float16" for autocast; float16 scales the loss dynamically and needs a GPU. None for full precision.
            In mmdet's detectors bfloat16 is for the backbone, and neck and heads stay in float32: mmcv's operators know none.
        accumulative_counts: batches between two updates; their gradients are averaged. An epoch's last update may have fewer.
        clip_grad: arguments of `torch.nn.utils.clip_grad_norm_`, such as `max_norm`; None for no clipping.

    Attributes:
        grad_norm: norm of the newest gradients before they were clipped, on their device; None without clipping.

    Raises:
        UserError: an unknown dtype, or one that this machine cannot train in; an unknown argument of the clipping.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: str | None = None,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer, accumulative_counts, dict(clip_grad) if clip_grad else None)
        if dtype not in (None, *DTYPES):
            hint = did_you_mean(str(dtype), DTYPES)
            raise UserError(f"optim_wrapper.dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}{hint}")
        for key in self.clip_grad_kwargs or {}:
            if key not in (names := signature(self.clip_func).parameters):
                raise UserError(f"optim_wrapper.clip_grad.{key}: expected {', '.join(names)}{did_you_mean(key, names)}")
        self.device_type = get_device()
        if dtype == "float16" and self.device_type == "cpu":
            remedy = "add --cfg-options optim_wrapper.dtype=bfloat16"
            raise UserError(f"optim_wrapper.dtype: float16 needs a GPU, and torch sees none; {remedy}")
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == "float16")
        self.grad_norm: Tensor | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass; no exchange of gradients between processes while they accumulate."""
        if self.dtype is torch.bfloat16 and is_detector(unwrapped(model)):
            precision = backbone_autocast(model, self.dtype)
        else:
            precision = torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)
        with super().optim_context(model), precision:
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backpropagate the scaled loss."""
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Clip, and update the parameters unless a scaled gradient has overflowed."""
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.clip_func(parameters, **self.clip_grad_kwargs)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def begin_epoch(self, batches: int) -> None:
        """Count an epoch's batches anew: what is left at its end makes an update, as a checkpoint holds no gradients."""
        self._inner_count, self._max_counts = 0, batches
        self._remainder_counts = batches % self._accumulative_counts

    def state_dict(self) -> dict:
        """The optimizer's, and the loss scaler's."""
        return {**super().state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """What `state_dict` gave.

        Raises:
            UserError: it is of another optimizer, or of other parameter groups.
        """
        state_dict = dict(state_dict)
        check_groups(self.optimizer, state_dict["param_groups"])
        scaler = state_dict.pop("loss_scaler", {})
        if scaler and self.loss_scaler.is_enabled():
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(with_own_kernels(self.optimizer, state_dict))


def check_groups(optimizer: torch.optim.Optimizer, stored: Sequence[Mapping[str, Any]]) -> None:
    """Whether an optimizer can go on from groups that a run has stored.

    Raises:
        UserError: they are another optimizer's, or cut otherwise.
    """
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (stored, optimizer.param_groups))
    if theirs != ours:
        raise UserError(
            f"--resume: the checkpoint has groups of {theirs} parameters, this config makes {ours}; expected the optim_wrapper "
            "that the run began with, paramwise_cfg and all"
        )
    lacking = [name for name in ("momentum", "betas") if name in optimizer.defaults and any(name not in group for group in stored)]
    if lacking:  # of what no version of an optimizer has added later
        kind = type(optimizer).__name__
        raise UserError(f"--resume: the checkpoint is of another optimizer than {kind}: it has no {' and no '.join(lacking)}")


def with_own_kernels(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's stored state, but to go on with the kernels that `optimizer` was built with: a run may have had others."""
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    return {**state_dict, "param_groups": [{**group, **own} for group in state_dict["param_groups"]]}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OptimWrapperConstructor:
    """timm's parameter groups: no weight decay for vectors, biases and what a model's `no_weight_decay()` names.

    torch's Adam and AdamW make their fused step: it alone need not wait for the device in float16, to know whether a gradient has
    overflowed. Muon, timm's or `visionssm.Muon`, gets the decayed matrices and convolutions' kernels; its AdamW (NAdamW with
    `nesterov`) gets the rest: A and D of a scan, say, or a stack of the projections of several paths.

    Args:
        optim_wrapper_cfg: `type` and arguments of the OptimWrapper, with the `optimizer` in it.
        paramwise_cfg: `decay`, endings of names that are decayed although `no_weight_decay()` names them, as the published
            training did it; `no_decay`, patterns of the names that are not decayed, in place of timm's rule, as OpenMMLab's
            recipes have it, `decay` still coming first; `layer_decay`, the factor of the learning rate from one layer to the
            layer before it, in the groups of the backbone's `group_matcher()`; `fallback`, patterns of what else Muon leaves to
            AdamW.

    Raises:
        UserError: another key in `paramwise_cfg`, a `layer_decay` out of range, or one pattern as `fallback` where several are
            expected.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        known = ("decay", "no_decay", "layer_decay", "fallback")
        for key in paramwise_cfg or {}:
            if key not in known:
                raise UserError(
                    f"optim_wrapper.paramwise_cfg.{key}: expected {', '.join(known)}; further groups come from the model's "
                    f"no_weight_decay(){did_you_mean(key, known)}"
                )
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.decay = tuple((paramwise_cfg or {}).get("decay", ()))
        self.no_decay = (paramwise_cfg or {}).get("no_decay")
        self.layer_decay = (paramwise_cfg or {}).get("layer_decay", 1.0)
        if isinstance(self.layer_decay, bool) or not isinstance(self.layer_decay, int | float) or not 0 < self.layer_decay <= 1:
            raise UserError(f"optim_wrapper.paramwise_cfg.layer_decay: got {self.layer_decay!r}, expected a number in (0, 1]")
        self.fallback = (paramwise_cfg or {}).get("fallback", ())
        if isinstance(self.fallback, str):
            raise UserError(f"optim_wrapper.paramwise_cfg.fallback: got {self.fallback!r}, expected a tuple of patterns")

    def __call__(self, model: nn.Module) -> MMEngineOptimWrapper:
        """Build the optimizer and its wrapper for a model, or for one inside a distributed wrapper.

        Raises:
            UserError: torch's own Muon, which would refuse most of a model's parameters; `fallback` with another optimizer.
        """
        model = unwrapped(model)
        cfg = dict(self.optim_wrapper_cfg)
        optimizer = dict(cfg.pop("optimizer"))
        kind = optimizer.get("type")
        cls = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        cls = cls if isinstance(cls, type) else object  # mmengine says what it cannot build
        if cls is getattr(torch.optim, "Muon", None):
            raise UserError("optim_wrapper.optimizer.type: torch's Muon takes matrices alone; expected 'visionssm.Muon'")
        if cls in (Adam, AdamW) and not {"foreach", "differentiable"} & optimizer.keys():
            optimizer.setdefault("fused", True)
        if self.fallback and not issubclass(cls, TimmMuon):
            raise UserError(f"optim_wrapper.paramwise_cfg.fallback: is for visionssm.Muon, got the optimizer {kind!r}")
        if issubclass(cls, TimmMuon):
            optimizer["type"] = cls  # by its name alone another scope would have torch's
        optimizer["params"] = self.groups(model, optimizer["lr"], optimizer.get("weight_decay", 0.0), issubclass(cls, TimmMuon))
        cfg.setdefault("type", "visionssm.OptimWrapper")
        return ROOT_OPTIM_WRAPPERS.build(cfg, default_args={"optimizer": OPTIMIZERS.build(optimizer)})

    def groups(self, model: nn.Module, lr: float, weight_decay: float, is_muon: bool = False) -> list[dict[str, Any]]:
        """The groups that learn fastest first: the first one's learning rate is what the logs show."""
        excluded = no_weight_decay(model) if self.no_decay is None else self.no_decay
        scales = layer_scales(model, self.layer_decay)
        groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            named = any(fnmatch(name, pattern) for pattern in excluded) and not name.endswith(self.decay)
            if self.no_decay is None:
                decayed = parameter.ndim > 1 and not name.endswith(".bias") and not named
            else:
                decayed = not named
            matrix = parameter.ndim in (2, 4, 5)  # or a convolution's kernel; three dimensions are a stack, or channels' own
            orthogonal = is_muon and decayed and matrix and not any(fnmatch(name, pattern) for pattern in self.fallback)
            groups.setdefault((scales.get(name, 1.0), decayed, orthogonal), []).append(parameter)
        return [
            {"params": groups[key], "lr": lr * key[0], "weight_decay": weight_decay if key[1] else 0.0}
            | ({"use_muon": key[2]} if is_muon else {})
            for key in sorted(groups, reverse=True)
        ]


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names, from `model` down, of the parameters that any module in it excludes by `no_weight_decay()`."""
    names = set()
    for path, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            names |= {f"{path}.{name}" if path else name for name in module.no_weight_decay()}
    return names


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors of the learning rate by parameter name: 1 in a classifier's last group, its head, `layer_decay` before it, and so on.

    Parameters outside a module with a `group_matcher()`, such as a detector's heads, are not named; they count as the last group.
    """
    if layer_decay == 1.0:
        return {}
    scales = {}
    for path, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            layers = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
            heads_outside = len(layers) < sum(1 for _ in model.parameters())
            last = max(layers.values()) + heads_outside
            scales |= {f"{path}.{name}" if path else name: layer_decay ** (last - layer) for name, layer in layers.items()}
    return scales
