"""What one of two processes under torchrun does for test_sync_bn.py: trains for an update, writes what its batch norms saw.

Usage: torchrun --nproc-per-node 2 batch_norms.py CONFIG FOLDER
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from mmengine.hooks import Hook

from visionssm.engine.distributed import unwrapped
from visionssm.engine.launch import main_train
from visionssm.registry import HOOKS


@HOOKS.register_module()
class BatchNormRecorder(Hook):
    """Of every batch norm: its type, the mean over this process's inputs, (channels,), and the running mean after one update."""

    def before_train(self, runner):
        norms = dict(unwrapped(runner.model).named_modules()).items()
        self.norms = {name: norm for name, norm in norms if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)}
        self.inputs = {}
        for name, norm in self.norms.items():
            norm.register_forward_pre_hook(partial(self.record, name))

    def record(self, name, norm, inputs):
        if norm.training:
            self.inputs[name] = inputs[0].detach().mean((0, 2, 3))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        found = {
            name: (type(norm).__name__, self.inputs[name].cpu(), norm.running_mean.detach().cpu())
            for name, norm in self.norms.items()
        }
        torch.save(found, Path(FOLDER, f"rank{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    CONFIG, FOLDER = sys.argv[1:]
    sys.exit(main_train([CONFIG, "--work-dir", f"{FOLDER}/work"]))
