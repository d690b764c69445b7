"""What the README says is true: its table of models and its first example."""

import re
from pathlib import Path

import pytest
import timm

import visionssm  # noqa: F401

README = (Path(__file__).parents[1] / "README.md").read_text()
MODULES = ("vim", "vmamba", "local_vim", "local_vmamba")


def test_table_lists_every_model_with_its_parameters():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]*) ?\| (\d+) \|$", README, flags=re.MULTILINE)
    assert {row[0] for row in rows} == {name for module in MODULES for name in timm.list_models(module=module)}
    for name, parameters, _, side in rows:
        model = timm.create_model(name, device="meta", num_classes=1000)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters, name
        assert model.pretrained_cfg["input_size"][-1] == int(side), name


def test_first_example_runs(capsys):
    example = re.search(r"```python\n(import timm.*?)```", README, flags=re.DOTALL)
    exec(example[1], {})
    assert capsys.readouterr().out.splitlines()[0] == "96 (1, 96, 50, 82)"


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (Path(__file__).parents[1] / target).exists()
