import numpy as np
import pytest
from PIL import Image

# where mmengine is not installed, training has nothing to test
pytest.importorskip("mmengine")

from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from visionssm import config_path


@pytest.fixture(autouse=True)
def fresh_mmengine():
    """mmengine names its global objects by config and second: two tests in one second would share them."""
    yield
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer):
        for logger in manager._instance_dict.values():
            for handler in getattr(logger, "handlers", ()):
                handler.close()
        manager._instance_dict.clear()


@pytest.fixture
def tiny(tmp_path):
    """A config of two epochs of four small batches with a tiny timm model, and its work directory."""
    config = tmp_path / "tiny.py"
    config.write_text(
        f"_base_ = {str(config_path('classification/vmamba-nano_digits'))!r}\n"
        "model = dict(backbone=dict(model_name='test_resnet'))\n"
        "train_cfg = dict(max_epochs=2, val_interval=1)\n"
        "train_dataloader = dict(batch_size=16, num_batch_per_epoch=4)\n"
        "val_dataloader = dict(num_batch_per_epoch=1)\n"
        "test_dataloader = dict(num_batch_per_epoch=1)\n"
    )
    return config, tmp_path / "work"


@pytest.fixture
def photographs(tmp_path):
    """Two classes of bright and dark images: 12 to train on, 4 to validate on, 4 to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for name, level in (("bright", 200), ("dark", 30)):
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(level, level + 50, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return tmp_path / "photographs"
