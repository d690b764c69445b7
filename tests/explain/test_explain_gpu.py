"""Hidden attention on a GPU, where the Triton backend runs the transposed scans: against float64 on the CPU."""

from dataclasses import replace

import pytest
import torch
from small_models import build
from torch.testing import assert_close

from visionssm.explain import Attention, attribution, effective_receptive_field, record, rollout
from visionssm.explain.attention import INCLUDES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = [0, (1, 2), "mean"]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def taped(kind, dtype):
    model, images = build(kind, dtype)
    model, images = model.cuda(), images.cuda()
    with record(model) as tape, torch.no_grad():
        model(images)
    return tape


def wide(value):
    return value.double().cpu() if isinstance(value, torch.Tensor) else value


def exact_scan(attention):
    """The attention of the same dt, B and C in float64 on the CPU."""
    fields = vars(attention._operands)
    return Attention(replace(attention._operands, **{name: wide(value) for name, value in fields.items()}), attention.layout)


def close(actual, expected, tolerance):
    assert actual.is_cuda
    assert actual.dtype == torch.float32
    assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", ["ssm", "ssm+skip"])
def test_rows(kind, dtype, include):
    """dt, B and C are rounded by the model alone: what follows is exact to float32, also in a bfloat16 model."""
    tape = taped(kind, dtype)
    for layer in range(len(tape)):
        attention = tape.attention(layer).include(include)
        expected = exact_scan(attention).include(include)
        close(attention.rows(TOKENS, channels=slice(3)), expected.rows(TOKENS, channels=slice(3)), 1e-5)
        close(attention.matrix(), expected.matrix(), 1e-5)
        close(attention.row_bound(), expected.row_bound(), 1e-5)
        v = torch.randn(attention.batch, attention.layout.tokens, attention.channels)
        close(attention.apply(v.cuda()), expected.apply(v), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", INCLUDES)
def test_the_whole_mixer(kind, dtype, include):
    """From the recorded inputs of a layer on, dt, B, C and the factors included, which a bfloat16 model rounds."""
    tape = taped(kind, dtype)
    twin, _ = build(kind, dtype)
    with record(twin.double()) as exact:
        for layer, other in zip(exact.layers, tape.layers, strict=True):
            layer.keep(tuple(wide(m) for m in other.inputs), other.grid)
    for layer in range(len(tape)):
        actual, expected = (t.attention(layer).include(include).rows(TOKENS) for t in (tape, exact))
        close(actual, expected, 1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(kind, dtype):
    """From the image to the map."""
    model, images = build(kind, torch.float64)
    with record(model) as tape, torch.no_grad():
        model(images)
    expected = [rollout(tape), attribution(model, images, 1), effective_receptive_field(model, images).double()]
    model, images = model.to("cuda", dtype), images.to("cuda", dtype)
    with record(model) as tape, torch.no_grad():
        model(images)
    actual = [rollout(tape), attribution(model, images, 1), effective_receptive_field(model, images)]
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e-3 if dtype == torch.float32 else 0.2)
