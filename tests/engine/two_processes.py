"""What one of two processes under torchrun does for the tests: reads shards, trains a tiny model; writes what it saw as JSON.

Usage: torchrun --nproc-per-node 2 two_processes.py SHARDS CONFIG FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from visionssm.engine import ImageStream, Runner
from visionssm.engine.launch import main_train


def seen(shards, split):
    """Labels, which are the images' numbers, of two epochs of this process, and the loader's length."""
    dataset = {
        "type": "visionssm.ImageStream",
        "name": "wds/",
        "split": split,
        "data_root": shards,
        "num_classes": 48,
        "input_size": 16,
    }
    cfg = {"batch_size": 4, "num_workers": 0, "sampler": None, "collate_fn": {"type": "visionssm.collate"}, "dataset": dataset}
    loader = Runner.build_dataloader(cfg, seed=0)
    assert isinstance(loader.dataset, ImageStream)
    epochs = []
    for epoch in (0, 1):
        loader.dataset.set_epoch(epoch)
        epochs.append([label for batch in loader for label in batch["labels"].tolist()])
    return {"epochs": epochs, "batches": len(loader)}


if __name__ == "__main__":
    shards, config, folder = sys.argv[1:]
    rank = int(os.environ["RANK"])
    result = {}
    if shards != "none":
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        result = {split: seen(shards, split) for split in ("train", "validation")}
        dist.destroy_process_group()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    sys.exit(main_train([config, "--work-dir", f"{folder}/work", "--cfg-options", "train_dataloader.batch_size=8"]))
