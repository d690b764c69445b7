"""Training whose weights, gradients and optimizer state are spread over the processes (FSDP), through mmengine's FlexibleRunner."""

import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine import __version__ as mmengine_version
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner as MMEngineFlexibleRunner
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from visionssm.errors import UserError
from visionssm.registry import STRATEGIES

from .optim import with_own_kernels
from .runner import Runner, explained_loading, quiet, written_whole

_WHOLE = StateDictOptions(full_state_dict=True)


@STRATEGIES.register_module()
class ShardedStrategy(DDPStrategy):
    """torch's `fully_shard`: every block is a unit, gathered before it computes and freed after it; the rest is one more.

    Checkpoints hold whole weights, those of a run with one process: they load with any number of processes. A moving average is not
    kept, and `optim_wrapper.accumulative_counts` exchanges gradients in every batch.

    Args:
        **kwargs: as mmengine's DDPStrategy.

    Raises:
        UserError: a single process, which torchrun has not started.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not self.distributed:
            raise UserError("strategy: ShardedStrategy spreads a model over processes; start them with torchrun")

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As the Runner's."""
        return quiet(super().build_logger(*args, **kwargs))

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        model = model.to(get_device())
        for block in blocks(model):
            fully_shard(block)
        return fully_shard(model)

    def _scale_lr(self) -> None:
        self.dispatch_kwargs["train_micro_batch_size_per_gpu"] *= self.optim_wrapper._accumulative_counts
        super()._scale_lr()

    def model_state_dict(self) -> dict[str, Any]:
        """The whole weights, on the CPU of every process; all have to call this."""
        return gathered(self.model.state_dict())

    def optim_state_dict(self) -> dict[str, Any]:
        """The whole state of the optimizer, likewise."""
        wrapper = self.optim_wrapper
        whole = gathered(get_optimizer_state_dict(self.model, wrapper.optimizer))
        return {"optimizer": whole, "loss_scaler": wrapper.loss_scaler.state_dict()}

    def load_model_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Spread whole weights, whose names must be the model's."""
        set_model_state_dict(self.model, state_dict, options=_WHOLE)

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Spread what `optim_state_dict` gave."""
        wrapper = self.optim_wrapper
        state = with_own_kernels(wrapper.optimizer, state_dict["optimizer"])
        set_optimizer_state_dict(self.model, wrapper.optimizer, state, options=_WHOLE)
        if wrapper.loss_scaler.is_enabled():
            wrapper.loss_scaler.load_state_dict(state_dict["loss_scaler"])

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict:
        """As the Runner's."""
        with explained_loading(filename):
            return super().load_checkpoint(filename, **kwargs)

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Callable[[dict], None] | None = None,
    ) -> None:
        """Gather everything, in every process, and write it in the first one."""
        extra = extra_ckpt or {}
        meta = {"seed": self.seed, "time": time.strftime("%Y%m%d_%H%M%S"), "mmengine": mmengine_version}
        content = {"state_dict": self.model_state_dict(), **extra, "meta": {**extra.get("meta", {}), **meta}}
        if save_optimizer:
            content["optimizer"] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, "param_schedulers"):
            content["param_schedulers"] = self.scheduler_state_dict()
        if callback is not None:
            callback(content)
        if is_main_process():
            with written_whole(filename) as partial:
                torch.save(content, partial)


class FlexibleRunner(MMEngineFlexibleRunner):
    """mmengine's, which a config asks for by `runner_type="FlexibleRunner"`, with a `strategy`; the rest as `Runner`.

    Raises:
        UserError: a moving average.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "env_cfg": kwargs.get("env_cfg") or {}})  # from_cfg hands on None
        for hook in self.hooks:
            if hasattr(hook, "ema_cfg"):
                raise UserError(
                    f"custom_hooks: {type(hook).__name__} needs whole weights, and a strategy may spread them; leave it out"
                )
        self.model = self.strategy.build_model(self.model)

    build_dataloader = staticmethod(Runner.build_dataloader)


def gathered(state: Any) -> Any:
    """The same nested dicts and lists, with whole tensors on the CPU.

    torch's own way, `full_state_dict=True`, leaves gloo with a thread that now and then aborts the process at its end (torch 2.11).
    """
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return state.cpu() if isinstance(state, Tensor) else state


def blocks(model: nn.Module) -> list[nn.Module]:
    """The children of the innermost lists that are named `blocks` or `layers`: what a backbone repeats."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("blocks", "layers") and isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    return [
        child
        for path, module in lists.items()
        if not any(other.startswith(f"{path}.") for other in lists)
        for child in module
        if any(True for _ in child.parameters())
    ]
