"""What the README says is true: its table of models and its first examples."""

import re
from pathlib import Path

import pytest
import timm
import torch

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


def test_mask_rcnn_of_torchvision_learns_and_predicts():
    example = re.search(r"```python\n(import timm[^`]*?MaskRCNN.*?)```", README, flags=re.DOTALL)[1]
    scope = {}
    exec(example.replace("vmamba_tiny_s1l8", "vmamba_nano"), scope)
    detector = scope["detector"]
    detector.transform.min_size, detector.transform.max_size = (64,), 96
    images = [torch.rand(3, 43, 64), torch.rand(3, 64, 51)]
    box, mask = torch.tensor([[4.0, 4.0, 30.0, 40.0]]), torch.zeros(1, 43, 64, dtype=torch.uint8)
    mask[:, 4:40, 4:30] = 1
    masks = [mask, torch.nn.functional.pad(mask[..., :51], (0, 0, 0, 21))]
    targets = [{"boxes": box, "labels": torch.tensor([1]), "masks": target} for target in masks]
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.backbone.fpn.parameters())
    assert [tuple(result["masks"].shape[2:]) for result in detector.eval()(images)] == [(43, 64), (64, 51)]


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (Path(__file__).parents[1] / target).exists()
