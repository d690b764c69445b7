"""torch.compile and torch.export of a small model per family: one graph, no warning, the numbers of eager execution."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import visionssm  # noqa: F401

NANOS = [name for name in timm.list_models("*_nano") if timm.model_entrypoint(name).__module__.startswith("visionssm.")]
LOCAL = ("v_flip", "w7_flip")
SHALLOW = {  # tracing takes seconds a block
    "vim_nano": {"depth": 1},
    "vmamba_nano": {"depths": (1, 1), "embed_dim": (32, 64)},
    "local_vim_nano": {"depth": 1, "paths": (LOCAL,)},
    "local_vmamba_nano": {"depths": (1,), "embed_dim": (32,), "paths": (LOCAL,)},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, shallow):
    return timm.create_model(name, num_classes=5, **(SHALLOW[name] if shallow else {}))


def step(function, model, x):
    """Output and gradients of one training step."""
    model.zero_grad()
    output = function(x)
    output.square().sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NANOS)
def test_one_graph(name):
    model, graphs = build(name, shallow=False), CompileCounterWithBackend("aot_eager")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True, backend=graphs), model, x), step(model, model, x))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", NANOS)
def test_one_graph_for_every_size(name):
    model, graphs = build(name, shallow=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    step(compiled, model, torch.randn(2, 3, 40, 48))
    count = graphs.frame_count
    for shape in ((3, 3, 56, 40), (2, 3, 24, 72)):
        x = torch.randn(shape)
        torch.testing.assert_close(step(compiled, model, x), step(model, model, x))
    assert graphs.frame_count == count


@pytest.mark.parametrize("name", NANOS)
def test_orders(name):
    """What one mode has cached, an index table say, must not reach the next: inference, training, compiled, and back."""
    model = build(name, shallow=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.eval()(x).clone()
    trained = step(model.train(), model, x)
    torch.testing.assert_close(step(compiled, model, x), trained)
    torch.testing.assert_close(step(model, model, x), trained)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), expected)
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(trained[0], expected)


@pytest.mark.parametrize("name", NANOS)
@torch.no_grad()
def test_export(name):
    model = build(name, shallow=False).eval()
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    assert any("visionssm.c" in str(node.target) for node in program.graph.nodes), "the operators stay whole"
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", NANOS)
@torch.no_grad()
def test_export_with_any_size(name):
    """Batch, height and width left open. Positions are part of the graph: resized, or, at the model's own size, not."""
    model = build(name, shallow=True).eval()
    free = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 3, 40, 48),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for shape in ((2, 3, 40, 48), (3, 3, 56, 40), (4, 3, 45, 71)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x))
