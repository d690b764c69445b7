"""What is checked of a detector or a segmentor before it runs: files, channels, classes; and a detector's precision."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionssm.errors import UserError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
HEADS = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")  # those of the data's classes; mmdet's RPN has one of its own


def check_files(cfg: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> None:
    """Look for the annotation files and folders that mmdet's and mmseg's data sets and metrics name.

    Raises:
        UserError: one does not exist.
    """
    for loader in loaders:
        for path, dataset in _datasets(cfg.get(loader) or {}, loader):
            root = str(dataset.get("data_root") or "")
            named = {"ann_file": dataset.get("ann_file")}
            named |= {f"data_prefix.{key}": value for key, value in (dataset.get("data_prefix") or {}).items()}
            for key, name in named.items():
                _check_exists(f"{path}.{key}", root, name)
        evaluator = loader.replace("dataloader", "evaluator")
        metrics = cfg.get(evaluator) or ()
        for metric in [metrics] if isinstance(metrics, Mapping) else metrics:
            _check_exists(f"{evaluator}.ann_file", "", metric.get("ann_file"))


def _check_exists(key: str, root: str, name: str | None) -> None:
    if name and "://" not in root + name and not (place := Path(root, name)).exists():
        raise UserError(f"{key}: no such file or folder: {place}; --cfg-options data_root=... says where the data lies")


def annotation_files(loader: Mapping[str, Any]) -> list[str]:
    """The files in COCO's format that a loader's data sets name."""
    named = [Path(str(d.get("data_root") or ""), d.get("ann_file") or "") for _, d in _datasets(loader, "dataloader")]
    return [str(path) for path in named if path.suffix == ".json"]


def _datasets(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The innermost data sets below a loader; wrappers hold one as `dataset`, or several as `datasets`."""
    inner = {f"{path}.dataset": node.get("dataset")}
    inner |= {f"{path}.datasets.{i}": dataset for i, dataset in enumerate(node.get("datasets") or ())}
    found = {key: dataset for key, dataset in inner.items() if isinstance(dataset, Mapping)}
    for key, dataset in found.items():
        yield from _datasets(dataset, key)
    if not found and path not in LOADERS:
        yield path, node


def check_channels(model: nn.Module) -> None:
    """Compare what the neck, or without one the heads, were made for with what a `visionssm.Backbone` gives.

    Raises:
        UserError: they differ.
    """
    backbone = getattr(model, "backbone", None)
    given = getattr(backbone, "out_channels", None)
    if given is None:
        return
    for name, reader in _readers(model):
        expected = getattr(reader, "in_channels", None)
        index = getattr(reader, "in_index", None)
        if isinstance(expected, int):  # one level, or a neck that reads all levels alike
            levels = given if index is None else (given[index],) if -len(given) <= index < len(given) else ()
            fits = set(levels) == {expected}
        elif isinstance(expected, Sequence):
            fits = list(expected) == [given[i] for i in index or range(len(given)) if i < len(given)]
        else:
            continue
        if not fits:
            where = "" if index is None else f" at in_index={index}"
            raise UserError(f"model.{name}.in_channels: got {expected}{where}, the backbone's levels have {list(given)} channels")


def _readers(model: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """What reads the backbone's levels: the neck, the first one of several, or without one the heads, each of a list."""
    neck = getattr(model, "neck", None)
    if isinstance(neck, nn.Sequential):
        yield "neck.0", neck[0]
    elif neck is not None:
        yield "neck", neck
    else:
        for name in ("decode_head", "auxiliary_head"):
            head = getattr(model, name, None)
            if isinstance(head, nn.ModuleList):
                yield from ((f"{name}.{i}", one) for i, one in enumerate(head))
            else:
                yield name, head


def check_classes(model: nn.Module, metainfo: Mapping[str, Any]) -> None:
    """Compare the classes in a data set's `metainfo`, if it has any, with those of the heads.

    Raises:
        UserError: their numbers differ.
    """
    classes = metainfo.get("classes")
    for name, module in model.named_modules():
        count = getattr(module, "num_classes", None)
        if classes and isinstance(count, int) and count != len(classes) and name.rstrip(".0123456789").endswith(HEADS):
            raise UserError(f"model.{name}.num_classes: got {count}, the data has {len(classes)} classes")


def is_detector(model: nn.Module) -> bool:
    """Whether it is a model of mmdet, or derived from one; mmdet is not imported for it."""
    return any(cls.__module__.startswith("mmdet.") for cls in type(model).__mro__)


def check_precision(model: nn.Module, optim_wrapper: Mapping[str, Any]) -> None:
    """Refuse bfloat16 in a detector where it would reach mmcv's operators, which do not know it.

    Raises:
        UserError: a detector without a `visionssm.Backbone`, or an optimizer wrapper other than ours, with `dtype` bfloat16.
    """
    if not is_detector(model) or optim_wrapper.get("dtype") not in ("bfloat16", torch.bfloat16):
        return
    if optim_wrapper.get("type") != "visionssm.OptimWrapper":
        raise UserError(
            f"optim_wrapper.dtype: mmcv's operators know no bfloat16, and {optim_wrapper.get('type')} takes it to them; "
            "pass optim_wrapper.type=visionssm.OptimWrapper, which keeps it to the backbone, or optim_wrapper.dtype=float16"
        )
    _backbones(model)


@contextmanager
def backbone_autocast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every `visionssm.Backbone` in `model` computes in `dtype` and returns float32; neck, heads and losses are left alone.

    Raises:
        UserError: there is none.
    """
    backbones = _backbones(model)
    for backbone in backbones:
        backbone.autocast_dtype = dtype
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.autocast_dtype = None


def _backbones(model: nn.Module) -> list[nn.Module]:
    """The modules that can have a precision of their own."""
    found = [module for module in model.modules() if hasattr(module, "autocast_dtype")]
    if not found:
        raise UserError(
            "optim_wrapper.dtype: in a detector bfloat16 is for a visionssm.Backbone, as mmcv's operators know none; "
            "pass optim_wrapper.dtype=float16, which needs a GPU, or train in full precision without --amp"
        )
    return found
