"""What the config in a checkpoint of a training run says, read without executing anything in it."""

import ast
from typing import Any


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
