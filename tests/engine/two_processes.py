"""What one of two processes under torchrun does for the tests: reads shards, trains a tiny model; writes what it saw as JSON.

Usage: torchrun --nproc-per-node 2 two_processes.py SHARDS HUB CONFIG FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from visionssm.engine import ImageStream, Runner
from visionssm.engine.launch import main_train


def seen(name, data_root, split):
    """Labels, which are the images' numbers, of two epochs of this process, and the loader's length."""
    dataset = {
        "type": "visionssm.ImageStream",
        "name": name,
        "split": split,
        "data_root": data_root,
        "num_classes": 48,
        "num_samples": 48,
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
    shards, hub, config, folder = sys.argv[1:]
    rank = int(os.environ["RANK"])
    result = {}
    kinds = {"shards": ("wds/", shards), "hub": (f"hfids/{hub}", f"{folder}/cache")}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in [kind for kind, source in (("shards", shards), ("hub", hub)) if source != "none"]:
        result[kind] = {split: seen(*kinds[kind], split) for split in ("train", "validation")}
    dist.destroy_process_group()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    sys.exit(main_train([config, "--work-dir", f"{folder}/work", "--cfg-options", "train_dataloader.batch_size=8"]))
