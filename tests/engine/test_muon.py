"""Muon in stacks is timm's Muon."""

import copy

import pytest
import torch
from timm.optim import Muon as TimmMuon
from timm.optim import muon as timm_muon
from torch.nn.functional import cross_entropy

from visionssm.engine import ImageClassifier, Muon, OptimWrapperConstructor
from visionssm.engine import muon as stacked

SHAPES = [(24, 24), (24, 24), (96, 24), (24, 96), (24, 24), (16, 8, 3, 3), (24, 96), (24, 1, 3, 3), (16, 8, 3, 3), (7,), (24, 5)]


def built(cls, **arguments):
    """Parameters, the last two of which are left to the fallback, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": parameters[:-2], "use_muon": True}, {"params": parameters[-2:], "use_muon": False}]
    return parameters, cls(groups, lr=0.02, weight_decay=0.1, **arguments)


def train(parameters, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def assert_alike(changed, expected, start):
    """Matrices are made orthogonal in bfloat16, in which products of a stack may round otherwise."""
    for result, reference, before in zip(changed, expected, start, strict=True):
        assert (result - reference).norm() < 1e-3 * (reference - before).norm()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nesterov": True},
        {"momentum": 0.8, "adjust_lr_fn": "rms_to_rms", "ns_coefficients": "polar_express", "ns_steps": 7},
        {"adjust_lr_fn": None, "scale_eps": True, "safety_factor": 1.01, "fallback_lr_scale": 0.1},
        {"algo": "adamuon"},
        {"conv_mode": "batched"},
    ],
    ids=str,
)
def test_updates_are_those_of_timm(arguments):
    start, _ = built(Muon)
    parameters, optimizer = built(Muon, **arguments)
    expected, reference = built(TimmMuon, **arguments)
    train(parameters, optimizer, 5)
    train(expected, reference, 5)
    assert_alike(parameters, expected, start)
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
    kept, known = ({key: set(state) for key, state in each.state_dict()["state"].items()} for each in (optimizer, reference))
    assert kept == known


def test_each_shape_is_made_orthogonal_once(monkeypatch):
    stacks = []

    def counted(matrices, *arguments, **options):
        stacks.append(tuple(matrices.shape))
        return timm_muon.zeropower_via_newtonschulz(matrices, *arguments, **options)

    monkeypatch.setattr(stacked, "zeropower_via_newtonschulz", counted)
    train(*built(Muon), 1)
    assert sorted(stacks) == [(1, 24, 9), (1, 96, 24), (2, 16, 72), (2, 24, 96), (3, 24, 24)]


def test_a_run_of_timm_is_resumed():
    expected, reference = built(TimmMuon, nesterov=True)
    train(expected, reference, 3)
    parameters, optimizer = built(Muon, nesterov=True)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    with torch.no_grad():
        for parameter, value in zip(parameters, expected, strict=True):
            parameter.copy_(value)
    start = [parameter.detach().clone() for parameter in parameters]
    train(parameters, optimizer, 3)
    train(expected, reference, 3)
    assert_alike(parameters, expected, start)


def test_parameters_without_gradient_stay():
    parameters, optimizer = built(Muon)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    changed = [not torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True)]
    assert changed == [number == 1 for number in range(len(SHAPES))]


@pytest.mark.parametrize("flags", [{}, {"use_fallback": False}, {"use_fallback": True, "use_muon": True}], ids=str)
def test_groups_that_leave_the_choice_to_timm(flags, monkeypatch):
    """Of these it takes no depthwise kernel for a matrix."""
    monkeypatch.setattr(stacked, "zeropower_via_newtonschulz", None)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    results = []
    for cls in (Muon, TimmMuon):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = cls([{"params": parameters, **flags}], lr=0.02)
        train(parameters, optimizer, 2)
        results.append(parameters)
        assert "exp_avg" in optimizer.state[parameters[SHAPES.index((24, 1, 3, 3))]]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_a_resumed_run_chose_stays():
    """timm chose by shape there, where the groups of today give every kernel to Muon."""
    parameters, _ = built(Muon)
    reference = TimmMuon([{"params": parameters}], lr=0.02)
    train(parameters, reference, 1)
    optimizer = Muon([{"params": parameters, "use_muon": True}], lr=0.02)
    stored = reference.state_dict()
    optimizer.load_state_dict({**stored, "param_groups": [{**stored["param_groups"][0], "use_muon": True}]})
    train(parameters, optimizer, 1)
    assert "momentum_buffer" not in optimizer.state[parameters[SHAPES.index((24, 1, 3, 3))]]


def test_hooks_are_called_once():
    """Also where an optimizer of timm's class has been made, around whose step torch then calls hooks."""
    built(TimmMuon)
    parameters, optimizer = built(Muon)
    groups = []
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda optimizer, *_: groups.append(len(optimizer.param_groups)))
    train(parameters, optimizer, 2)
    assert groups == [2] * 4


def test_groups_are_whole_after_an_error():
    parameters, optimizer = built(Muon)
    parameters[-1].grad = torch.eye(*SHAPES[-1]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert len(optimizer.param_groups) == 2


def test_a_closure_is_evaluated_once_and_its_loss_given():
    parameters, optimizer = built(Muon)
    calls = []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss.backward()
        return loss

    before = closure()
    assert optimizer.step(closure) == before
    assert len(calls) == 2
    assert closure() < before


def test_a_model_learns_with_it():
    torch.manual_seed(0)
    model = ImageClassifier({"model_name": "vmamba_nano", "num_classes": 3, "depths": (1, 1, 1, 1)})
    optimizer = {"type": "visionssm.Muon", "lr": 3e-3, "weight_decay": 0.05, "nesterov": True}
    wrapper = OptimWrapperConstructor({"optimizer": optimizer}, {"fallback": ("*.patch_embed.*", "*.head.*")})(model)
    assert type(wrapper.optimizer) is Muon
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    losses = []
    for _ in range(8):
        loss = cross_entropy(model.backbone(images), labels)
        wrapper.update_params(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
