"""A segmentor with synchronised batch norms in two processes: synchronised between GPUs, plain on CPUs, where torch has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionssm import config_path

CONFIG = """
_base_ = {base!r}
data_root = {root!r}
norm = dict(_delete_=True, type="SyncBN")
model = dict(decode_head=dict(norm_cfg=norm), auxiliary_head=dict(norm_cfg=norm))
train_cfg = dict(max_iters=1)
param_scheduler = None
default_hooks = dict(checkpoint=dict(interval=1))
custom_hooks = [dict(type="visionssm.BatchNormRecorder")]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root={root!r}))
test_dataloader = dict(num_workers=0, dataset=dict(data_root={root!r}, indices=2))
"""
MOMENTUM = 0.1  # torch's default


def one_update(digit_scenes, folder, **environ):
    """What the batch norms of both processes saw, and what was printed."""
    config = folder / "config.py"
    config.write_text(CONFIG.format(base=str(config_path("upernet_vmamba-nano_digit-scenes")), root=str(digit_scenes)))
    script = Path(__file__).with_name("batch_norms.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(script), str(config), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )
    assert run.returncode == 0, run.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert {name.split(".")[0] for name in ranks[0]} == {"decode_head", "auxiliary_head"}
    return ranks, run.stdout + run.stderr


def check_close(got, expected):
    """To the order of float32 sums."""
    torch.testing.assert_close(got, MOMENTUM * expected, rtol=1e-4, atol=1e-6)


def test_on_cpus_every_process_has_its_own_statistics(digit_scenes, tmp_path):
    ranks, printed = one_update(digit_scenes, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "SyncBN needs GPUs" in printed
    for rank in ranks:
        for kind, mean, running in rank.values():
            assert kind == "_BatchNormXd"  # mmengine's, of any number of dimensions
            check_close(running, mean)
    assert any(not torch.allclose(ranks[0][name][2], ranks[1][name][2]) for name in ranks[0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus_the_statistics_are_those_of_all_images(digit_scenes, tmp_path):
    ranks, printed = one_update(digit_scenes, tmp_path)
    assert "SyncBN needs GPUs" not in printed
    for name, (kind, mean, running) in ranks[0].items():
        assert kind == "SyncBatchNorm"
        assert torch.equal(running, ranks[1][name][2])
        check_close(running, (mean + ranks[1][name][1]) / 2)
    assert any(not torch.allclose(ranks[0][name][1], ranks[1][name][1]) for name in ranks[0])
