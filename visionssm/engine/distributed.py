"""Many processes, which torchrun starts: one per GPU, or several on a CPU for tests."""

import atexit
import os
import sys
import threading
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
        dist.barrier()  # the end of a process resets its connections, maybe before another has read what came last
    finally:
        dist.destroy_process_group()


def leave(status: int) -> int:
    """End this process with an exit status, if torchrun has started it; else return the status.

    gloo's threads outlive the group. Python before 3.14 stops a thread that asks for its lock while it ends, here amid C++ that
    lets go of a tensor, at which C++ aborts the process. So it ends as multiprocessing ends its children, by the system's own
    call, after what was to run at the end and with all output written.
    """
    if "LOCAL_RANK" not in os.environ:
        return status
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
