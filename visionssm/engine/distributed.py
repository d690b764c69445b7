"""Many processes, which torchrun starts: one per GPU, or several on a CPU for tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mmengine.model import is_model_wrapper

from visionssm.errors import UserError


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the other processes, if torchrun has started this one; yields whether it has.

    mmengine's own start on a CPU asks for a GPU, hence this one; it is NCCL between GPUs and gloo between CPUs.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        yield False
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: expected at most {torch.cuda.device_count()}, the number of this machine's GPUs")
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo")
    try:
        yield True
        # Who leaves right after the last exchange ends while gloo's thread still lets go of its tensors, at which torch aborts.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a distributed wrapper, or itself."""
    return model.module if is_model_wrapper(model) else model


def compile_backbone(model: torch.nn.Module, mode: str) -> None:
    """Run the backbone alone through torch.compile, in one graph; `mode` is torch's.

    Between processes torch would cut it, so that gradients travel while others are computed. Those of the models here, 400 MB at
    most, travel faster than the kernels of a cut graph are launched.
    """
    torch._dynamo.config.optimize_ddp = False
    unwrapped(model).backbone.compile(mode=mode)
