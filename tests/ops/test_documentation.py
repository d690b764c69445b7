"""The examples and names in ops/README.md are true."""

import re
from pathlib import Path

from visionssm import ops
from visionssm.ops.backends import BACKENDS

README = (Path(__file__).parents[2] / "ops" / "README.md").read_text()


def test_example_runs():
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})


def test_every_function_and_path_set_is_described():
    for name in ops.__all__:
        assert name in README or (name.endswith("_ref") and "`*_ref`" in README), name


def test_backends_are_those_of_the_table():
    section = README.split("## Backends")[1].split("##")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == BACKENDS
