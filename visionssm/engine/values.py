"""Values in a config that would fail deep in another library, or train nonsense, if nobody looked at them."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from visionssm.errors import UserError

_DICTS = (
    *("model", "model.backbone", "model.mixup", "model.batch_augmentation", "train_cfg"),
    *("optim_wrapper", "optim_wrapper.optimizer", "optim_wrapper.clip_grad", "optim_wrapper.paramwise_cfg"),
)
_LOADERS = ("train", "val", "test")
# the least value of numbers
_WHOLE = {
    "train_cfg.max_epochs": 1,
    "train_cfg.max_iters": 1,
    "train_cfg.val_interval": 1,
    "optim_wrapper.accumulative_counts": 1,
    "randomness.seed": 0,
    "default_hooks.logger.interval": 1,
    **{f"{name}_dataloader.batch_size": 1 for name in _LOADERS},
    **{f"{name}_dataloader.num_workers": 0 for name in _LOADERS},
}
_REAL = {
    "optim_wrapper.optimizer.lr": 0,
    "optim_wrapper.optimizer.weight_decay": 0,
    "optim_wrapper.clip_grad.max_norm": 0,
}


_MIXUP_MODES = ("batch", "pair", "elem")  # timm takes any other for the first


def check_values(cfg: Config) -> None:
    """Check kinds and ranges of what is often changed from the command line, as far as a config has it.

    Raises:
        UserError: a value of another kind or out of range; a loop of which a part is missing.
    """
    for path in (*_DICTS, *(f"{name}_dataloader" for name in _LOADERS)):
        if (value := _found(cfg, path)) is not None and not isinstance(value, Mapping):
            raise UserError(f"{path}: got {value!r}, expected a dict of values")
    for path, least in {**_WHOLE, **_REAL}.items():
        kinds, what = ((int,), "a whole number") if path in _WHOLE else ((int, float), "a number")
        value = _found(cfg, path)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value < least):
            raise UserError(f"{path}: got {value!r}, expected {what}, at least {least}")
    _check_size(cfg.get("input_size"))
    for path in (f"{name}_dataloader.sampler.shuffle" for name in _LOADERS):
        if (value := _found(cfg, path)) is not None and not isinstance(value, bool):
            raise UserError(f"{path}: got {value!r}, expected True or False")
    smoothing = _found(cfg, "model.label_smoothing")
    if smoothing is not None and not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
        raise UserError(f"model.label_smoothing: got {smoothing!r}, expected a number from 0 to below 1")
    optimizer = _found(cfg, "optim_wrapper.optimizer") or {}
    if optimizer.get("lr", 0) is None:
        raise UserError("optim_wrapper.optimizer.lr: got None, expected a number, at least 0")
    mode = _found(cfg, "model.mixup.mode")
    if mode not in (None, *_MIXUP_MODES):
        raise UserError(f"model.mixup.mode: got {mode!r}, expected one of {', '.join(_MIXUP_MODES)}")
    interval = _found(cfg, "default_hooks.checkpoint.interval")
    if interval is not None and not (type(interval) is int and (interval >= 1 or interval == -1)):
        what = "a whole number, at least 1, or -1 for never"
        raise UserError(f"default_hooks.checkpoint.interval: got {interval!r}, expected {what}")
    for name, third in zip(_LOADERS, ("optim_wrapper", "val_evaluator", "test_evaluator"), strict=True):
        parts = {key: cfg.get(key) is not None for key in (f"{name}_dataloader", f"{name}_cfg", third)}
        if any(parts.values()) and not all(parts.values()):
            lacking = ", ".join(key for key, given in parts.items() if not given)
            raise UserError(f"{', '.join(parts)}: expected all or none; {lacking} {'is' if ',' not in lacking else 'are'} None")


def _check_size(size: Any) -> None:
    sides = size if isinstance(size, list | tuple) else (size, size)
    if size is not None and (len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides)):
        raise UserError(f"input_size: got {size!r}, expected a whole number of pixels, at least 1, or (height, width)")


def _found(cfg: Config, path: str) -> Any:
    """The value at a dotted path, or None."""
    node: Any = cfg
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping | Config) else None
    return node
