"""What a checkpoint file of a training run says, read without executing anything in it."""

import ast
import pickle
from pathlib import Path
from typing import Any

import torch

from visionssm.errors import UserError, first_line


class _Inert:
    """Stands for any class or function that a checkpoint names: it can be called and filled, and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a `.pth` file: tensors, containers, numbers and strings as they are, all else inert.

    A training checkpoint holds objects of mmengine and numpy besides its weights (logged values, the random state); they are
    neither needed nor created here, so that neither mmengine nor trust in the file is.

    Raises:
        UserError: not a checkpoint of PyTorch, broken, or not a dict.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a checkpoint that PyTorch can read safely: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected the dict that training writes")
    return content


def read_config(text: str, *names: str) -> dict[str, Any]:
    """The values of some variables in the text of a config, as mmengine writes it: `dict(...)` calls and literals only.

    Raises:
        ValueError: a value that is neither.
    """
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    values = {node.targets[0].id: node.value for node in assignments if isinstance(node.targets[0], ast.Name)}
    return {name: _value(values[name]) for name in names if name in values}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    return ast.literal_eval(node)
