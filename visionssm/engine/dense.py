"""What is checked of a detector or a segmentor before it runs: its files, and the channels between its parts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visionssm.errors import UserError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def check_files(cfg: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> None:
    """Look for the annotation files and folders that mmdet's and mmseg's data sets name.

    Raises:
        UserError: one does not exist.
    """
    for loader in loaders:
        for path, dataset in _datasets(cfg.get(loader) or {}, loader):
            root = str(dataset.get("data_root") or "")
            named = {"ann_file": dataset.get("ann_file")}
            named |= {f"data_prefix.{key}": value for key, value in (dataset.get("data_prefix") or {}).items()}
            for key, name in named.items():
                if name and "://" not in root + name and not (place := Path(root, name)).exists():
                    raise UserError(
                        f"{path}.{key}: no such file or folder: {place}; --cfg-options data_root=... says where the data lies"
                    )


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
    neck = getattr(model, "neck", None)
    readers = (
        {"neck": neck} if neck is not None else {name: getattr(model, name, None) for name in ("decode_head", "auxiliary_head")}
    )
    for name, reader in readers.items():
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
