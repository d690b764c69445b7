"""Reading a checkpoint file of unknown origin without running anything in it.

A published file is a pickle that names foreign classes beside the weights: the run's config or arguments, the optimizer, logged
values. They are never imported. `torch.load(weights_only=True)` admits tensors and plain containers; the foreign names that are
known to occur are replaced by inert stand-ins; a file that names anything else is refused.
"""

import pickletools
import threading
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

# What the published files and mmengine's checkpoints are known to name beside weights. Nothing of it is run or imported:
# `builtins.getattr` and `functools.partial` appear where mmengine's logged values refer to their statistics.
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
    | {f"numpy.dtypes.{kind}DType" for kind in ("Bool", "UInt8", "Int32", "Int64", "Float16", "Float32", "Float64", "Str")}
)
# What weights are made of; torch would run more than these, `bytearray(1 << 40)` for one.
_WEIGHT_NAMES = frozenset(
    {"collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.set"}
    | {f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")}
    | {f"torch.{kind}Storage" for kind in ["Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]}
    | {
        f"torch.{name}"
        for name in ["Size", "device", "float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"]
    }
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # how protocol 2 calls these modules

ENTRIES = ("model", "state_dict")  # where the weights lie, in order of preference
EMA_ENTRIES = ("model_ema", "ema_model", "ema_state_dict")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)  # int64: a norm's counter
_MAX_PICKLE = 64 << 20  # bytes; mmengine keeps every logged value in it, some ten megabytes after a long run
_MAX_OPCODES = 2_000_000  # the largest known have some ten thousand
_MAX_TUPLE = 1_000_000  # elements of a tuple with all that are nested in it, each as often as it occurs
_MAX_DEPTH = 100  # of nested tuples

_lock = threading.Lock()  # torch's list of admitted names is one for all threads


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
    foreign = _check_archive(path) & KNOWN_FOREIGN_NAMES
    try:
        with _lock, torch.serialization.safe_globals([(_CONTAINERS.get(name, _Inert), name) for name in foreign]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes the reader stumble over
        raise UserError(f"{path}: not a checkpoint that PyTorch can read safely: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    return _plain(content, path)


def _reason(error: Exception) -> str:
    """The first line of what torch says, without its advice to read the file unsafely."""
    text = str(error)
    return first_line(ValueError(text.rpartition("WeightsUnpickler error:")[2] or type(error).__name__))


def _plain(value: Any, path: Path) -> Any:
    """The same with dicts of our own: a file can give an OrderedDict attributes that hide its methods. Checks all tensors."""
    if isinstance(value, dict):
        return {key: _plain(item, path) for key, item in dict.items(value)}
    if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # An expanded tensor would fill the memory when copied.
        raise UserError(f"{path}: refused: it claims a tensor of {tuple(value.shape)} and stores less")
    return value


def _check_archive(path: Path) -> set[str]:
    """Refuse what is no archive of `torch.save`, and one that would unpack to much more than its size.

    Returns:
        The names of all classes and functions that its pickle refers to.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_sizes(path, entries)
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
        page = start.startswith((b"<!doctype", b"<html"))
        what = "an HTML page, not a checkpoint" if page else "not a checkpoint that torch.save wrote since PyTorch 1.6"
        raise UserError(f"{path}: {what}, or a broken one: {first_line(error)}") from error
    names = set().union(*(_names_in(path, content) for content in pickles))
    unknown = sorted(names - KNOWN_FOREIGN_NAMES - _WEIGHT_NAMES)
    if unknown:
        raise UserError(
            f"{path}: refused: it names {shortened(unknown)}, which no known checkpoint needs and loading could run; "
            "nothing was loaded"
        )
    return names


def _check_sizes(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(f"{path}: refused: {shortened(packed, 1)} in it is compressed, which torch.save never does")
    size = path.stat().st_size
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path}: refused: it states contents larger than its {size:,} bytes")
    if sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl")) > _MAX_PICKLE:
        raise UserError(f"{path}: refused: its pickle is larger than {_MAX_PICKLE:,} bytes, so it holds more than weights")


def _names_in(path: Path, content: bytes) -> set[str]:
    """The names that a pickle refers to, from its opcodes alone; refuses what would exhaust time or memory when it is run.

    The opcodes are followed with a stack of sizes: a tuple that holds another one twice, which holds another one twice, and so on
    takes a few bytes, and hashing it as the key of a dict a lifetime.
    """
    names: set[str] = set()
    stack: list[Any] = []  # of (elements, depth) for tuples, (1, 0) for all else, or the mark
    memo: dict[Any, tuple[int, int]] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name in ("STACK_GLOBAL", "INST") or count > _MAX_OPCODES:
                raise UserError(f"{path}: refused: its pickle is not one that torch.save writes ({opcode.name}, opcode {count})")
            if opcode.name == "GLOBAL":
                module, _, name = argument.partition(" ")
                names.add(f"{_PYTHON_2.get(module, module)}.{name}")
            taken = []
            if pickletools.markobject in opcode.stack_before:
                while (top := stack.pop()) is not pickletools.markobject:
                    taken.append(top)
                below = opcode.stack_before.index(pickletools.markobject)
            else:
                below = len(opcode.stack_before)
            taken += [stack.pop() for _ in range(below)]
            pushed: Any = (1, 0)
            if opcode.name.startswith("TUPLE"):
                pushed = 1 + sum(elements for elements, _ in taken), 1 + max((depth for _, depth in taken), default=0)
                if pushed[0] > _MAX_TUPLE or pushed[1] > _MAX_DEPTH:
                    raise UserError(f"{path}: refused: it nests tuples to {pushed[0]:,} elements, {pushed[1]} deep")
            elif "GET" in opcode.name:
                pushed = memo[argument]
            elif "PUT" in opcode.name:
                memo[argument] = stack[-1]
            elif opcode.name == "MEMOIZE":
                pushed = memo[len(memo)] = taken[0]
            elif opcode.name == "DUP":
                pushed = taken[0]
            stack += [pickletools.markobject if what is pickletools.markobject else pushed for what in opcode.stack_after]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its pickle is broken: {first_line(error)}") from error
    return names


def select_weights(content: dict[str, Any], entry: str | None = None, source: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a checkpoint's content, under the names that the file has.

    Args:
        content: what `read_checkpoint` returned.
        entry: the key under which they lie; None takes "model" or "state_dict", else `content` itself, and warns where the file
            also holds a moving average.
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
    elif isinstance(content.get(entry), dict):
        weights = content[entry]
    else:
        raise UserError(f"{source}: has no weights under {entry!r}; it has {', '.join(found) or 'none'}")
    weights = dict(weights)
    strays = [f"{name} ({type(value).__name__})" for name, value in weights.items() if not isinstance(value, Tensor)]
    if strays or not weights:
        raise UserError(f"{source}: expected names and their tensors, found {shortened(strays, 3) or 'nothing'}")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: expected names of tensors, found {shortened([repr(name)])}")
        _check_tensor(value, f"{source}: {shortened([name])}")
    return weights


def _check_tensor(value: Tensor, what: str) -> None:
    """Refuse what is no plain array of numbers."""
    if value.layout is not torch.strided or value.is_quantized or value.dtype not in _DTYPES:
        raise UserError(f"{what} is a {value.dtype} tensor, {value.layout}; expected plain {', '.join(map(str, _DTYPES))}")
