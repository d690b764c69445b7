"""A classifier's published weights, for a test by a recipe."""

from pathlib import Path

import timm
from mmengine.config import Config

from visionssm.errors import UserError, shortened
from visionssm.weights import find, read_checkpoint

from .config import CLASSIFIERS
from .distributed import unwrapped
from .runner import Runner

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


def is_of_a_backbone(cfg: Config, checkpoint: str) -> bool:
    """Whether this is a classifier as timm knows it, by a published name or in a file, and not a training's checkpoint."""
    if cfg.model.get("type") not in CLASSIFIERS:
        return False
    if not Path(checkpoint).exists():
        return Path(checkpoint).suffix not in SUFFIXES and "/" not in checkpoint
    try:
        content = read_checkpoint(checkpoint)
    except UserError:
        return False  # the runner says what is wrong with the file
    weights = content.get("state_dict", content)  # where a training has them
    return isinstance(weights, dict) and not any(name.removeprefix("module.").startswith("backbone.") for name in weights)


def load_published(runner: Runner, cfg: Config, checkpoint: str) -> tuple[str, str | None]:
    """Load what `is_of_a_backbone` found into the model.

    Returns:
        What to call it: the whole name, where it was a model's alone, or the file. And what one should know of the result, or None.

    Raises:
        UserError: an unknown name, weights of another model, a runner that shards weights, or test data whose classes are others,
            or the same in another order.
    """
    if not isinstance(runner, Runner):
        raise UserError(f"runner_type: got {cfg.runner_type!r}, expected 'Runner' to test published weights")
    row = None if Path(checkpoint).is_file() else find(checkpoint)
    name = row.name if row else checkpoint
    model = unwrapped(runner.model)
    model.initial_weights = name
    model.init_weights()
    if row is None:
        return name, None
    classes = tuple(runner.test_dataloader.dataset.metainfo["classes"])
    if row.classes and classes != row.classes:
        raise UserError(
            f"data_root: its classes are {shortened(classes)}; {name} was trained for {shortened(row.classes)}, in this order"
        )
    trained, size = timm.get_pretrained_cfg(name).input_size[-1], cfg.input_size
    same = size in (trained, [trained] * 2, (trained,) * 2)
    return name, None if same else f"{name} is for images of {trained} px, the config has {size}"
