"""Hidden attention of float32 and bfloat16 models, on a GPU by Triton's transposed scans: against float64 on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import build
from torch.testing import assert_close

from visionssm.explain import Attention, attribution, effective_receptive_field, record, rollout
from visionssm.explain.attention import INCLUDES
from visionssm.explain.class_attribution import class_gradients, weighted_product

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = [0, (1, 2), "mean"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def taped(kind, dtype, device):
    model, images = build(kind, dtype)
    model, images = model.to(device), images.to(device)
    with record(model) as tape, torch.no_grad():
        model(images)
    return tape


def wide(value):
    return value.double().cpu() if isinstance(value, torch.Tensor) else value


def exact_scan(attention):
    """The attention of the same dt, B and C in float64 on the CPU."""
    fields = vars(attention._operands)
    return Attention(replace(attention._operands, **{name: wide(value) for name, value in fields.items()}), attention.layout)


@pytest.fixture
def close(device):
    def check(actual, expected, tolerance):
        assert actual.device.type == device
        assert actual.dtype == torch.float32
        assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance * expected.abs().max().item())

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", ["ssm", "ssm+skip"])
def test_rows(kind, dtype, include, device, close):
    """dt, B and C are rounded by the model alone: what follows is exact to float32, also in a bfloat16 model."""
    tape = taped(kind, dtype, device)
    for layer in range(len(tape)):
        attention = tape.attention(layer).include(include)
        expected = exact_scan(attention).include(include)
        close(attention.rows(TOKENS, channels=slice(3)), expected.rows(TOKENS, channels=slice(3)), 1e-5)
        close(attention.matrix(), expected.matrix(), 1e-5)
        close(attention.row_bound(), expected.row_bound(), 1e-5)
        v = torch.randn(attention.batch, attention.layout.tokens, attention.channels)
        close(attention.apply(v.to(device)), expected.apply(v), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", INCLUDES)
def test_the_whole_mixer(kind, dtype, include, device, close):
    """From the recorded inputs of a layer on, dt, B, C and the factors included, which a bfloat16 model rounds."""
    tape = taped(kind, dtype, device)
    twin, _ = build(kind, dtype)
    with record(twin.double()) as exact:
        for layer, other in zip(exact.layers, tape.layers, strict=True):
            layer.keep(tuple(wide(m) for m in other.inputs), other.grid)
    for layer in range(len(tape)):
        actual, expected = (t.attention(layer).include(include).rows(TOKENS) for t in (tape, exact))
        close(actual, expected, 1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_a_recording(kind, dtype, device, close):
    """From the recording and the gradients to the map: a bfloat16 model has rounded both, and nothing is rounded so after them.

    The gradients are scaled to a mean magnitude of 1: as they are, what they weight would vanish beside the identity.
    """
    model, images = build(kind, dtype)
    tape, layers, gradients = class_gradients(model.to(device), images.to(device), 1, start_layer=0)
    scaled = [gradient / gradient.abs().mean() for gradient in gradients]
    exact = copy.copy(tape)
    exact.attention = lambda layer: exact_scan(tape.attention(layer))
    expected = weighted_product(exact, layers, [wide(gradient) for gradient in scaled])
    close(weighted_product(tape, layers, scaled), expected, 1e-5)
    close(rollout(tape), rollout(exact), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(kind, dtype, device, close):
    """From the image to the map.

    Attribution keeps the positive part of signed elements, so that a bfloat16 model's own rounding turns some on or off: there
    test_maps_of_a_recording says how exact it is.
    """
    model, images = build(kind, torch.float64)
    with record(model) as tape, torch.no_grad():
        model(images)
    expected = [rollout(tape), effective_receptive_field(model, images).double(), attribution(model, images, 1)]
    model, images = model.to(device, dtype), images.to(device, dtype)
    with record(model) as tape, torch.no_grad():
        model(images)
    actual = [rollout(tape), effective_receptive_field(model, images)]
    if dtype == torch.float32:
        actual.append(attribution(model, images, 1))
    for a, b in zip(actual, expected[: len(actual)], strict=True):
        close(a, b, 1e-3 if dtype == torch.float32 else 0.2)
