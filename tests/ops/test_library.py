"""The operators as PyTorch sees them: registration, meta tensors, compilation, tracing, inference mode, second derivatives."""

import pytest
import torch
from torch.autograd import grad, gradgradcheck

from visionssm.ops import (
    CROSS,
    ScanPaths,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_selective_scan_packed,
    selective_scan,
)
from visionssm.ops.testing import cross_selective_scan_inputs, outputs_and_gradients, pack, selective_scan_inputs

PATHS = ("h", "v", "w2", "v_flip")
OPERATORS = torch.ops.visionssm
for _function in ("cross_scan", "cross_merge", "cross_selective_scan", "cross_selective_scan_packed", "selective_scan"):
    torch.fx.wrap(_function)


def as_leaves(inputs):
    return {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "full dt"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_opcheck_scan(low_rank, merge):
    inputs = cross_selective_scan_inputs(size=(3, 4), paths=PATHS, rank=2 if low_rank else None, D=low_rank, dtype=torch.float32)
    x, x_dbl, A, D, dt_weight, dt_bias = as_leaves(pack(inputs)).values()
    tensors = (x.unsqueeze(1).detach().requires_grad_(), x_dbl, A, D, dt_weight, dt_bias)
    arguments = (*tensors, list(PATHS), True, merge, not merge, "chunked")
    torch.library.opcheck(OPERATORS.cross_selective_scan, arguments)
    with torch.no_grad():
        y, _, states = OPERATORS.cross_selective_scan(*arguments)
    tensors = [None if t is None else t.detach() for t in tensors]
    arguments = (torch.ones_like(y), states, *tensors, list(PATHS), True, merge, "chunked")
    torch.library.opcheck(OPERATORS.cross_selective_scan_backward, arguments)


@pytest.mark.parametrize("token_at", [None, 5])
def test_opcheck_moves(token_at):
    arguments = (["h", "w2_flip"], 3, 4, token_at)
    positions = 12 + (token_at is not None)
    x = torch.randn(2, 1, positions, 3, requires_grad=True)
    torch.library.opcheck(OPERATORS.cross_scan, (x, *arguments))
    ys = torch.randn(2, 2, 16 + (token_at is not None), 3, requires_grad=True)
    for merge in (True, False):
        torch.library.opcheck(OPERATORS.cross_merge, (ys, *arguments, merge))


def test_opcheck_mixed_precision():
    """16-bit maps with float32 parameters, and float64 parameters beside float32 maps: real and fake dtypes agree."""
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        inputs = pack(cross_selective_scan_inputs(size=(2, 3), dtype=dtype))
        inputs = {name: t.to(dtype if name in ("x", "x_dbl") else wide).requires_grad_() for name, t in inputs.items()}
        x, *rest = inputs.values()
        arguments = (x.unsqueeze(1).detach().requires_grad_(), *rest, list(CROSS), True, True, True, "chunked")
        torch.library.opcheck(OPERATORS.cross_selective_scan, arguments)


def test_meta_tensors(backend):
    """Shapes and dtypes without data, on every public form."""
    inputs = cross_selective_scan_inputs(size=(3, 4), paths=PATHS, dtype=torch.bfloat16, device="meta")
    options = {"paths": PATHS, "backend": backend}
    y = cross_selective_scan(**inputs, **options)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 3, 4, 4))
    assert cross_selective_scan_packed(**pack(inputs), merge=False, **options).shape == (2, 4, 3, 4, 4)
    y, state = selective_scan(**selective_scan_inputs(device="meta"), return_last_state=True, backend=backend)
    assert (y.device.type, y.shape, state.shape) == ("meta", (2, 6, 13), (2, 6, 4))
    ys = cross_scan(torch.empty(2, 3, 4, 5, device="meta"), PATHS)
    assert (ys.device.type, ys.shape) == ("meta", (2, 4, 16, 5))
    assert cross_merge(ys, PATHS, (3, 4)).shape == (2, 3, 4, 5)


# --- compilation ------------------------------------------------------------------------------------------------------


def image_scan(x, dt, A, B, C, D, dt_weight, dt_bias, backend=None):
    return cross_selective_scan(x, dt, A, B, C, D, paths=PATHS, dt_weight=dt_weight, dt_bias=dt_bias, backend=backend)


def packed_scan(x, x_dbl, A, D, dt_weight, dt_bias, backend=None):
    options = {"paths": PATHS, "merge": False, "backend": backend}
    return cross_selective_scan_packed(x, x_dbl, A, D, dt_weight=dt_weight, dt_bias=dt_bias, **options)


def ordered_scan(x, A, D, dt_bias, backend=None):
    """LocalVim's way: cross_scan, projections and a scan in path order, cross_merge; here with a token in the middle."""
    _, height, width, _ = x.shape
    paths = ScanPaths(PATHS, (height, width), height * width // 2)
    u = cross_scan(torch.nn.functional.pad(x.flatten(1, 2), (0, 0, 0, 1)), paths)
    B, C = u[..., :2], u[..., 2:]
    return cross_merge(cross_selective_scan(u, u, A, B, C, D, paths=paths, dt_bias=dt_bias, order="scan", backend=backend), paths)


def mamba_scan(u, delta, A, B, C, D, z, delta_bias, backend=None):
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, True, return_last_state=True, backend=backend)[0]


SIZES = ((3, 5), (4, 6), (5, 4))
IMAGES = [cross_selective_scan_inputs(size=size, paths=PATHS, dtype=torch.float32) for size in SIZES]
FORMS = {
    "image": (image_scan, IMAGES),
    "packed": (packed_scan, [pack(inputs) for inputs in IMAGES]),
    "ordered": (ordered_scan, [{name: inputs[name] for name in ("x", "A", "D", "dt_bias")} for inputs in IMAGES]),
    "mamba": (mamba_scan, [selective_scan_inputs(length=length, groups=2, dtype=torch.float32) for length in (7, 9, 12)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_compile_with_dynamic_shapes(form):
    """One graph for all sizes, no break, no warning, and eager's numbers forward and backward."""
    torch._dynamo.reset()
    function, inputs = FORMS[form]
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=True)
    for arguments in inputs:
        actual, expected = outputs_and_gradients(compiled, arguments), outputs_and_gradients(function, arguments)
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
    assert graphs.frame_count == 1


def test_compiled_then_eager_and_inference_then_training():
    """Nothing that one mode makes is left over for the next: a cached fake or inference tensor would break the later call."""
    torch._dynamo.reset()
    inputs = cross_selective_scan_inputs(size=(2, 9), paths=PATHS, dtype=torch.float32)
    sequences = {name: inputs[name] for name in ("x", "A", "D", "dt_bias")}
    with torch.inference_mode():
        first = image_scan(**inputs)
    trained = outputs_and_gradients(image_scan, inputs)
    compiled = outputs_and_gradients(torch.compile(ordered_scan, fullgraph=True, backend="aot_eager"), sequences)
    eager = outputs_and_gradients(ordered_scan, sequences)
    torch.testing.assert_close(trained["y"], first.clone())
    torch.testing.assert_close(compiled, eager)
    with torch.inference_mode():
        maps = cross_merge(cross_scan(torch.randn(1, 6, 7, 2), PATHS), PATHS, (6, 7))
    assert maps.is_inference()
    assert outputs_and_gradients(lambda x: cross_scan(x, PATHS), {"x": torch.randn(1, 6, 7, 2)})["dx"].isfinite().all()


class Mixer(torch.nn.Module):
    """Every function called by name, as the layers do, with its checks behind the call."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.ones(4, 3, 2))

    def forward(self, x):
        sequences = cross_scan(x, PATHS)
        B = sequences[..., :2]
        y = cross_selective_scan(sequences, sequences, self.A, B, B, paths=PATHS, order="scan")
        return cross_merge(y, PATHS, (3, 5))


def test_symbolic_trace():
    """torch.fx keeps each operator as one call, and the traced module gives the same bits."""
    module = Mixer()
    traced = torch.fx.symbolic_trace(module)
    calls = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert {"cross_scan", "cross_selective_scan", "cross_merge"} <= set(calls)
    x = torch.randn(2, 3, 5, 3)
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)


def test_export():
    """torch.export keeps the operators, with symbolic height and width."""

    class Scan(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return cross_selective_scan(x, dt, A, B, C, paths=PATHS)

    def arguments(size):
        inputs = cross_selective_scan_inputs(size=size, paths=PATHS, rank=None, D=False, dt_bias=False, dtype=torch.float32)
        return tuple(inputs[name] for name in ("x", "dt", "A", "B", "C"))

    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    per_path = {2: height, 3: width}
    program = torch.export.export(
        Scan(), arguments((3, 5)), dynamic_shapes=({1: height, 2: width}, per_path, None, per_path, per_path)
    )
    assert any(node.target is OPERATORS.cross_selective_scan.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments((7, 4))), Scan()(*arguments((7, 4))), rtol=0, atol=0)


# --- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_inputs_unchanged_and_repeatable(form):
    """No input is written to, in forward or backward, and a second run gives the same bits."""
    function, (inputs, *_) = FORMS[form]
    leaves = as_leaves(inputs)
    before = {name: t.detach().clone() for name, t in leaves.items()}
    y = function(**leaves)
    kept = y.detach().clone()
    dy = torch.ones_like(y)
    first = grad(y, list(leaves.values()), dy, retain_graph=True)
    second = grad(y, list(leaves.values()), dy)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close({name: t.detach() for name, t in leaves.items()}, before, rtol=0, atol=0)
    torch.testing.assert_close(dy, torch.ones_like(dy), rtol=0, atol=0)
    torch.testing.assert_close(function(**leaves), kept, rtol=0, atol=0)


def with_gaps(t):
    """Every second element of a longer memory, the others NaN."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def reversed_axes(t):
    """Dense, with the first axis the fastest: what a transposed map looks like."""
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


@pytest.mark.parametrize("strided", [with_gaps, reversed_axes])
@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs(form, strided, backend):
    """Strided inputs and gradients, and an expanded gradient, give what contiguous ones give."""
    function, (inputs, *_) = FORMS[form]
    leaves = as_leaves(inputs)
    views = {name: strided(t.detach()).requires_grad_() for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in views.values() if t.dim() > 1)
    y, y_view = function(**leaves, backend=backend), function(**views, backend=backend)
    torch.testing.assert_close(y_view, y)
    dy = torch.randn_like(y, memory_format=torch.contiguous_format)
    for gradient, other in ((dy, strided(dy)), (torch.ones_like(y), torch.ones(()).expand(y.shape))):
        expected = grad(y, list(leaves.values()), gradient, retain_graph=True)
        torch.testing.assert_close(grad(y_view, list(views.values()), other, retain_graph=True), expected)


def test_autocast_changes_nothing(backend):
    """Neither the dtype of the result nor a bit of it, forward and backward: the scan chooses its own precision."""
    inputs = cross_selective_scan_inputs(dtype=torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    plain = outputs_and_gradients(cross_selective_scan, inputs, paths=CROSS, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = outputs_and_gradients(cross_selective_scan, inputs, paths=CROSS, backend=backend)
    torch.testing.assert_close(autocast, plain, rtol=0, atol=0)


def test_only_what_needs_a_gradient_gets_one():
    """Frozen inputs stay without gradient, and the last state carries none."""
    inputs = cross_selective_scan_inputs()
    inputs["dt_weight"].requires_grad_()
    cross_selective_scan(**inputs, paths=CROSS).sum().backward()
    assert {name for name, t in inputs.items() if t.grad is not None} == {"dt_weight"}
    _, state = selective_scan(**as_leaves(selective_scan_inputs()), return_last_state=True)
    assert not state.requires_grad


# --- second derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cross_selective_scan", "cross_selective_scan_packed", "selective_scan"])
def test_double_backward_is_refused_on_chunked(form):
    """One operator serves three functions there, and the message names each."""
    function, inputs, options = {
        "cross_selective_scan": (cross_selective_scan, cross_selective_scan_inputs(), {"paths": CROSS}),
        "cross_selective_scan_packed": (cross_selective_scan_packed, pack(cross_selective_scan_inputs()), {"paths": CROSS}),
        "selective_scan": (selective_scan, selective_scan_inputs(), {}),
    }[form]
    x, *_ = leaves = as_leaves(inputs).values()
    y = function(**dict(zip(inputs, leaves, strict=True)), **options, backend="chunked")
    (dx,) = grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"no second derivative of .*\b{form}\b.* backend='reference'"):
        dx.sum().backward()


def test_double_backward_on_reference():
    inputs = as_leaves(cross_selective_scan_inputs(batch=1, size=(2, 2), channels=1, state=1, paths=("v", "w2_flip"), rank=1))

    def function(*tensors):
        return cross_selective_scan(**dict(zip(inputs, tensors, strict=True)), paths=("v", "w2_flip"), backend="reference")

    assert gradgradcheck(function, tuple(inputs.values()))


def test_double_backward_of_the_moves():
    """cross_scan and cross_merge are linear and each other's gradient, to any order."""
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: cross_merge(cross_scan(x, PATHS).square(), PATHS, (2, 3)), x)
