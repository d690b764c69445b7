"""Weights under the names of a published file -> the same under ours, in a safetensors file."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visionssm.errors import UserError
from visionssm.models._checkpoint import check_fit, own_names, strip_wrappers

_BACKBONE = "backbone."
_OUT_NORM = "outnorm"


def is_dense(weights: dict[str, Tensor]) -> bool:
    """Whether weights are a detector's or segmentor's: a backbone and the rest under their own prefixes."""
    return any(name.startswith(_BACKBONE) for name in strip_wrappers(weights))


def to_own_names(weights: dict[str, Tensor], model: nn.Module, source: str = "checkpoint") -> dict[str, Tensor]:
    """Published names -> ours, completely or not at all; weights under our names pass unchanged.

    Of a detector or segmentor the backbone's names change, below the prefix `backbone.`; its output norms and all else keep theirs.

    Args:
        weights: names to tensors, of any generation of published names, with or without `module.` prefixes.
        model: a model of this zoo of the same architecture; for a detector's or segmentor's file one without classifier.
        source: names the checkpoint in messages.

    Raises:
        UserError: weights of another model.
    """
    family = sys.modules[type(model).__module__]
    weights = strip_wrappers(weights)
    if not is_dense(weights):
        own = own_names(weights, model, family.checkpoint_filter_fn, source)
        check_fit(own, model, source)
        return own
    backbone = {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}
    rest = {name: value for name, value in weights.items() if not name.startswith(_BACKBONE)}
    norms = {name: value for name, value in backbone.items() if name.startswith(_OUT_NORM)}
    trunk = {name: value for name, value in backbone.items() if name not in norms}
    own = own_names(trunk, model, family.checkpoint_filter_fn, source)
    check_fit(own, model, source, ignored=("norm", "norm_f", "head"))  # output norms stand in for the last norm
    return {f"{_BACKBONE}{name}": value for name, value in (own | norms).items()} | rest


def save_safetensors(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a `.safetensors` file; it appears under its name only when it is whole.

    Args:
        weights: names to tensors.
        path: the file.
        metadata: texts for the file's head.

    Raises:
        UserError: another suffix, no such folder, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file")
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(
            {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()},
            part,
            {"format": "pt", **metadata},
        )
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
