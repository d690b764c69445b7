"""The CUDA C++ kernels against the reference in float64: on a GPU, or emulated on a CPU (with TRITON_INTERPRET=1).

test_triton.py runs this file in an interpreting process of its own, where the emulator stands in for NVRTC.
"""

import os

import pytest
import torch

from visionssm.ops import CROSS, ScanPaths, cross_selective_scan, cross_selective_scan_ref
from visionssm.ops.testing import assert_within_budget, cross_selective_scan_inputs, outputs_and_gradients, to_float64

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Serve from csrc whatever the size, as on one multiprocessor, so that a block walks several images; count the launches; every
    tensor the launcher allocates starts as NaN."""
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda, launch

    launched = []
    compile_kernel = cuda.compile_kernel
    if INTERPRETED:
        import emulator

        if emulator.COMPILER is None:
            pytest.skip("needs g++")
        compile_kernel = emulator.compile_kernel
        monkeypatch.setattr(cuda, "enabled", lambda device: True)

    def counted(kernel, *case):
        launched.append(kernel)
        return compile_kernel(kernel, *case)

    def poisoned(*args, **kwargs):
        return new_empty(*args, **kwargs).fill_(float("nan"))

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(cuda, "compile_kernel", counted)
    monkeypatch.setattr(cuda, "processors", lambda device: 1)
    monkeypatch.setattr(launch._Scan, "_splits", lambda self, programs, tiles: (1, tiles))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return launched


@pytest.mark.parametrize(
    ("size", "paths", "options"),
    [
        ((3, 5), CROSS, {"dtype": BF16, "rank": 3}),
        ((5, 7), CROSS, {"dtype": F16, "rank": 6, "channels": 96, "batch": 1}),
        ((1, 19), ("h", "h_flip"), {"dtype": BF16, "shared": False, "rank": 2}),
        ((5, 4), ("v_flip",), {"dtype": F16, "channels": 40, "batch": 1, "rank": 9}),
        ((5, 3), ("w2", "w2_flip"), {"dtype": BF16, "batch": 1, "rank": 1}),
        ((4, 5), ("w7", "v"), {"dtype": BF16, "batch": 1, "rank": 24}),
        ((17, 1), ("v", "h"), {"dtype": F16, "D": False, "dt_bias": False, "batch": 1, "rank": 48}),
        ((5, 4), CROSS, {"dtype": BF16, "batch": 3, "rank": 10, "channels": 136}),
        ((1, 1), ("v", "h_flip"), {"dtype": BF16, "batch": 1, "rank": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("merge", [True, False])
def test_map(kernels, size, paths, options, merge):
    check(size, paths, options, merge)
    assert kernels == ["scan_forward", "scan_backward"]


def check(size, paths, options, merge):
    """y and every gradient of one case are within budget."""
    inputs = cross_selective_scan_inputs(size=size, paths=paths, device=DEVICE, **{"state": 1, "channels": 24, **options})

    def op(**tensors):
        return cross_selective_scan(**tensors, paths=paths, merge=merge, backend="triton")

    def reference(**tensors):
        return cross_selective_scan_ref(**tensors, paths=ScanPaths(paths, size), merge=merge)

    low, high = outputs_and_gradients(reference, inputs), outputs_and_gradients(reference, to_float64(inputs))
    actual = outputs_and_gradients(op, inputs)
    assert actual.keys() == high.keys()
    for name in high:
        assert_within_budget(actual[name], low[name], high[name], name)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_an_infinity_spoils_no_more_than_it_reaches(kernels, dtype):
    inputs = cross_selective_scan_inputs(1, (4, 5), 24, 1, ("h", "v"), 3, dtype=dtype, device=DEVICE)
    for name in ("B", "C", "D"):  # no difference of two infinities
        inputs[name] = inputs[name].abs()
    inputs["x"][0, 2, 2, 0] = float("inf")
    y = cross_selective_scan(**inputs, paths=("h", "v"), backend="triton")
    expected = cross_selective_scan_ref(**to_float64(inputs), paths=ScanPaths(("h", "v"), (4, 5)))
    assert kernels == ["scan_forward"]
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isposinf(), expected.isposinf())


@pytest.mark.parametrize("rank", [3, 6, 8])
@pytest.mark.parametrize("name", ["B", "C"])
def test_an_infinite_row_spoils_no_step(kernels, name, rank):
    """Of dt | B | C, whose B and C lie where a product of 8 ranks would read on."""
    inputs = cross_selective_scan_inputs(1, (2, 9), 24, 1, ("h", "v"), rank, dtype=BF16, device=DEVICE)
    for positive in ("x", "B", "C", "D"):  # no difference of two infinities
        inputs[positive] = inputs[positive].abs()
    inputs[name][..., 1, 7, :] = float("inf")
    y = cross_selective_scan(**inputs, paths=("h", "v"), merge=False, backend="triton")
    expected = cross_selective_scan_ref(**to_float64(inputs), paths=ScanPaths(("h", "v"), (2, 9)), merge=False)
    assert kernels == ["scan_forward"]
    assert 0 < expected.isfinite().sum() < expected.numel()
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isposinf(), expected.isposinf())


def test_values_up_to_the_largest_float(kernels):
    inputs = cross_selective_scan_inputs(1, (4, 5), 24, 1, ("h", "v"), 3, dtype=BF16, device=DEVICE)
    inputs["x"].fill_(1.5)
    inputs["D"].copy_(torch.tensor([[1.2e38], [0.0]]))  # one path of 2^127.1
    y = cross_selective_scan(**inputs, paths=("h", "v"), backend="triton")
    assert kernels == ["scan_forward"]
    torch.testing.assert_close(y, torch.full_like(y, 1.8e38))


def test_float16_takes_weights_beyond_its_range(kernels):
    inputs = cross_selective_scan_inputs(1, (4, 5), 24, 1, ("h", "v"), 3, dtype=F16, device=DEVICE)
    inputs["dt"] *= 1e-4
    inputs["dt_weight"].fill_(60000.0)
    y = cross_selective_scan(**inputs, paths=("h", "v"), backend="triton")
    expected = cross_selective_scan_ref(**to_float64(inputs), paths=ScanPaths(("h", "v"), (4, 5)))
    assert kernels == ["scan_forward"]
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(("size", "paths"), [((1, 17), ("h", "h_flip")), ((1, 16), ("h",)), ((3, 3), CROSS)], ids=str)
def test_steps_after_the_end_of_a_path_overflow_nothing(kernels, size, paths, softplus):
    """There only the bias is left of the step: exp(bias A) is infinite, and every gradient finite all the same."""
    inputs = cross_selective_scan_inputs(1, size, 8, 1, paths, 1, dtype=BF16, device=DEVICE)
    sign = 1 if softplus else -1
    inputs["dt_bias"].fill_(sign * 100)
    inputs["dt_weight"].fill_(1.0)
    inputs["dt"].fill_(-sign * 101)
    inputs["A"] = sign * (0.5 + torch.rand_like(inputs["A"])) * 2
    options = {"paths": paths, "dt_softplus": softplus}
    exact = {"paths": ScanPaths(paths, size), "dt_softplus": softplus}
    actual = outputs_and_gradients(lambda **t: cross_selective_scan(**t, **options, backend="triton"), inputs)
    expected = outputs_and_gradients(lambda **t: cross_selective_scan_ref(**t, **exact), to_float64(inputs))
    assert kernels == ["scan_forward", "scan_backward"]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=0.02, atol=0.02 * value.abs().max().item())


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gradients_that_cancel(kernels, dtype):
    """Equal channels, but for x, half of which has the other sign and is a hundredth smaller: dB and dC to float32's accuracy."""
    inputs = cross_selective_scan_inputs(1, (4, 5), 8, 1, ("h", "v"), 3, D=False, dtype=dtype, device=DEVICE)
    for name in ("A", "dt_weight", "dt_bias"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name]).contiguous()
    inputs["x"] = inputs["x"][..., :1] * torch.tensor([1.0 + 2.0**-7, -1.0], dtype=dtype, device=DEVICE).repeat(4)

    def gradients(op, tensors, **options):
        leaves = tensors | {name: tensors[name].clone().requires_grad_() for name in "BC"}
        return torch.autograd.grad(op(**leaves, **options).sum(), [leaves[name] for name in "BC"])

    paths = ScanPaths(("h", "v"), (4, 5))
    low, high = (gradients(cross_selective_scan_ref, tensors, paths=paths) for tensors in (inputs, to_float64(inputs)))
    actual = gradients(cross_selective_scan, inputs, paths=("h", "v"), backend="triton")
    for name, *results in zip("BC", actual, low, high, strict=True):
        assert_within_budget(*results, f"d{name}")
    assert kernels == ["scan_forward", "scan_backward"]


@pytest.fixture
def broken(kernels, monkeypatch):
    """Choose kernels that fail to compile."""
    from visionssm.ops.kernels import cuda

    compile_kernel = cuda.compile_kernel

    def choose(*names):
        def compile_or_fail(kernel, *case):
            if kernel in names:
                raise cuda.NotCompiledError(kernel)
            return compile_kernel(kernel, *case)

        monkeypatch.setattr(cuda, "compile_kernel", compile_or_fail)

    return choose


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("fails", "serves"), [("scan_forward", "scan_backward"), ("scan_backward", "scan_forward")])
def test_triton_serves_in_place_of_a_kernel_that_does_not_compile(kernels, broken, fails, serves, merge):
    """One direction by Triton, the other from csrc: they keep the same states."""
    broken(fails)
    check((3, 5), CROSS, {"dtype": BF16, "rank": 3}, merge)
    assert kernels == [serves]
