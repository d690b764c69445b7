"""Reading a checkpoint file of unknown origin without running anything in it.

A published file is a pickle that names foreign classes beside the weights: the run's config or arguments, the optimizer, logged
values. They are never imported. `torch.load(weights_only=True)` admits tensors and plain containers; the foreign names that are
known to occur are replaced by inert stand-ins; a file that names anything else is refused.
"""

import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visionssm.errors import UserError, first_line, shortened

# What the published files and mmengine's checkpoints are known to name, besides what torch itself allows. Nothing of it is run or
# imported: `builtins.getattr` and `functools.partial` appear where mmengine's logged values refer to their statistics.
KNOWN_FOREIGN_NAMES = frozenset(
    {
        "argparse.Namespace",
        "yacs.config.CfgNode",
        "builtins.getattr",
        "builtins.slice",
        "functools.partial",
        "collections.deque",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.bool_",
        "_codecs.encode",
        "mmengine.config.config.ConfigDict",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "mmengine.logging.message_hub.MessageHub",
    }
    | {
        f"numpy.dtypes.{kind}DType"
        for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "UInt32", "Bool", "Str")
    }
)

ENTRIES = ("model", "state_dict")  # where the weights lie, in order of preference
EMA_ENTRIES = ("model_ema", "ema_model", "ema_state_dict")
_MAX_PICKLE = 64 << 20  # bytes; the largest known, with the states of an optimizer, is below one megabyte


class _Inert:
    """Stands for any class or function that a checkpoint names: it can be called and filled, and does nothing."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict(_Inert):
    """Stands for a subclass of dict: torch fills plain containers only, so it becomes one."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _InertList(_Inert):
    """Stands for a kind of list."""

    def __new__(cls, *args: Any) -> Any:
        return []


_CONTAINERS = {
    "yacs.config.CfgNode": _InertDict,
    "mmengine.config.config.ConfigDict": _InertDict,
    "collections.deque": _InertList,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file: tensors, containers, numbers and strings as they are, known foreign objects inert.

    Tensors of a `.pth` file are views of the file's memory map, on the CPU: reading costs memory only for what is used.

    Args:
        path: what `torch.save` wrote since PyTorch 1.6, or a `.safetensors` file.

    Raises:
        UserError: no such file, not such a file, broken, or it names something that a checkpoint has no need of.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a checkpoint file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
    _check_archive(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unknown = sorted(set(names) - KNOWN_FOREIGN_NAMES)
        if unknown:
            raise UserError(
                f"{path}: refused: it names {shortened(unknown)}, which no known checkpoint needs and loading could run; "
                "nothing was loaded"
            )
        with torch.serialization.safe_globals([(_CONTAINERS.get(name, _Inert), name) for name in names]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a hostile pickle makes the reader stumble over
        raise UserError(f"{path}: not a checkpoint that PyTorch can read safely: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    return content


def _reason(error: Exception) -> str:
    """The first line of what torch says, without its advice to read the file unsafely."""
    text = str(error)
    return first_line(ValueError(text.rpartition("WeightsUnpickler error:")[2] or type(error).__name__))


def _check_archive(path: Path) -> None:
    """Refuse what is no archive of `torch.save`, and one that would unpack to much more than its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
        what = (
            "an HTML page, not a checkpoint"
            if start.startswith((b"<!doctype", b"<html"))
            else "not a checkpoint that torch.save wrote since PyTorch 1.6"
        )
        raise UserError(f"{path}: {what}, or a broken one: {first_line(error)}") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(f"{path}: refused: {packed[0]} in it is compressed, which torch.save never does")
    size = path.stat().st_size
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path}: refused: it states contents larger than its {size:,} bytes")
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if any(entry.file_size > _MAX_PICKLE for entry in pickles):
        raise UserError(f"{path}: refused: its pickle is larger than {_MAX_PICKLE:,} bytes, so it holds more than weights")


def select_weights(content: dict[str, Any], entry: str | None = None, source: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a checkpoint's content, under the names that the file has.

    Args:
        content: what `read_checkpoint` returned.
        entry: where they lie; None takes "model" or "state_dict", else `content` itself, and warns where the file also holds a
            moving average.
        source: names the file in messages.

    Raises:
        UserError: no such entry, or one that does not map names to whole tensors.
    """
    found = [name for name in (*ENTRIES, *EMA_ENTRIES) if isinstance(content.get(name), dict)]
    if entry is None:
        weights = content[found[0]] if found else content
        averages = [name for name in found if name in EMA_ENTRIES and name != found[0]]
        if averages:
            warnings.warn(f"{source}: holds {found[0]} and {averages[0]}; {found[0]} is taken", stacklevel=2)
    elif entry in found:
        weights = content[entry]
    else:
        raise UserError(f"{source}: has no weights under {entry!r}; it has {', '.join(found) or 'none'}")
    strays = [f"{name} ({type(value).__name__})" for name, value in weights.items() if not isinstance(value, Tensor)]
    if strays or not weights:
        raise UserError(f"{source}: expected names and their tensors, found {shortened(strays, 3) or 'nothing'}")
    for name, value in weights.items():
        # An expanded tensor claims more elements than it stores, and would fill the memory when copied.
        if not value.is_meta and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{source}: {name} claims {tuple(value.shape)}, more than is stored")
    return dict(weights)
