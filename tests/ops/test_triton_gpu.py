"""The Triton backend on a GPU alone: CUDA graphs, maps of more than 2^31 elements, several devices."""

import pytest
import torch

from visionssm.ops import CROSS, backends, cross_merge, cross_scan, cross_selective_scan_packed, selective_scan
from visionssm.ops.testing import cross_selective_scan_inputs, outputs_and_gradients, pack, selective_scan_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def leaves_of(inputs):
    return {name: t.requires_grad_() for name, t in inputs.items() if t is not None}


def map_inputs(**options):
    return leaves_of(pack(cross_selective_scan_inputs(2, (5, 6), 24, 1, CROSS, 3, dtype=torch.float32, device="cuda", **options)))


def test_cuda_graph():
    t = map_inputs()
    with torch.no_grad():
        expected = cross_selective_scan_packed(**t, paths=CROSS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cross_selective_scan_packed(**t, paths=CROSS)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


def test_moves_in_a_cuda_graph():
    x, paths = torch.randn(2, 5, 6, 8, device="cuda"), ("w3", "v_flip")

    def there_and_back():
        return cross_merge(cross_scan(x, paths), paths, (5, 6))

    expected = there_and_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there_and_back()
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


def test_more_elements_than_32_bits_in_a_batch():
    """720 x 178 x 178 x 96 elements: the last image alone gives the same bits."""
    t = pack(cross_selective_scan_inputs(1, (1, 1), 96, 1, ("v",), 2, dtype=torch.bfloat16, device="cuda"))
    t["x"] = torch.randn(720, 178, 178, 96, device="cuda", dtype=torch.bfloat16)
    t["x_dbl"] = torch.randn(720, 178, 178, 1, 4, device="cuda", dtype=torch.bfloat16)
    assert t["x"].numel() > 2**31
    y = cross_selective_scan_packed(**t, paths=("v",))
    one = cross_selective_scan_packed(**{k: m[-8:] if k in ("x", "x_dbl") else m for k, m in t.items()}, paths=("v",))
    torch.testing.assert_close(y[-8:], one, rtol=1e-2, atol=1e-2)  # another number of splits rounds otherwise


def test_more_elements_than_32_bits_in_an_image():
    """257 x 256 x 32768 elements in one image: the last channels alone give the same result."""
    channels = 32768
    t = pack(cross_selective_scan_inputs(1, (1, 1), channels, 1, ("v",), 1, dtype=torch.bfloat16, device="cuda"))
    t["x"] = torch.randn(1, 257, 256, channels, device="cuda", dtype=torch.bfloat16)
    t["x_dbl"] = torch.randn(1, 257, 256, 1, 3, device="cuda", dtype=torch.bfloat16)
    assert t["x"].numel() > 2**31
    y = cross_selective_scan_packed(**t, paths=("v",))
    last = {k: m if k == "x_dbl" else m[..., -64:] if k == "x" else m[:, -64:] for k, m in t.items()}
    expected = cross_selective_scan_packed(**last, paths=("v",))
    torch.testing.assert_close(y[..., -64:], expected, rtol=1e-2, atol=1e-2)


def test_sequence_of_a_batch_that_fills_the_device_and_of_one_that_does_not():
    """The number of splits depends on the batch; the result does not."""
    t = selective_scan_inputs(64, 64, 700, 16, dtype=torch.float32, device="cuda")
    y = selective_scan(**t, delta_softplus=True)
    one = {k: m[:1] if k in ("u", "delta", "B", "C", "z") else m for k, m in t.items()}
    torch.testing.assert_close(y[:1], selective_scan(**one, delta_softplus=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("state", "dtype"), [(65, torch.float32), (2, torch.float64)])
def test_the_slow_backend_compiles(state, dtype, dynamic):
    t = selective_scan_inputs(1, 4, 5, state, dtype=torch.float32, device="cuda")
    t["A"] = t["A"].to(dtype)
    backends._warn_slow.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match=r"A (has 65 state variables|is torch\.float64)"):
        y, last_state = compiled(**t, delta_softplus=True, return_last_state=True)
    expected = selective_scan(**t, delta_softplus=True, return_last_state=True, backend="chunked")
    torch.testing.assert_close((y, last_state), expected)


@pytest.mark.parametrize("function", [cross_selective_scan_packed, selective_scan])
def test_sources_that_nvrtc_refuses(monkeypatch, function):
    """Every kernel of csrc is told of, once, and Triton serves, forward and backward."""
    from visionssm.ops.kernels import cuda

    if function is selective_scan:
        inputs, options = selective_scan_inputs(64, 64, 96, 16, dtype=torch.bfloat16, device="cuda"), {"delta_softplus": True}
        kernels = ("sequence_spread", "sequence_backward")
    else:
        inputs = pack(cross_selective_scan_inputs(64, (8, 8), 96, 1, CROSS, 6, dtype=torch.bfloat16, device="cuda"))
        options, kernels = {"paths": CROSS}, ("scan_forward", "scan_backward")
    monkeypatch.setenv("VISIONSSM_CSRC", "0")
    expected = outputs_and_gradients(function, inputs, **options)
    monkeypatch.setenv("VISIONSSM_CSRC", "1")
    cuda._compiled.cache_clear()
    monkeypatch.setattr(cuda, "source", lambda kernel: f"#error {kernel} is broken")
    with pytest.warns(RuntimeWarning) as told:
        actual = outputs_and_gradients(function, inputs, **options)
    outputs_and_gradients(function, inputs, **options)
    cuda._compiled.cache_clear()
    assert len(told) == 2
    for warning, kernel in zip(told, kernels, strict=True):
        assert f"cannot compile {kernel} " in str(warning.message)
        assert f"{kernel} is broken" in str(warning.message)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_sums_of_parts_beyond_32_bits():
    """The offset of a part, not that of an element, exceeds 32 bits; the memory in between is never touched."""
    from visionssm.ops.kernels import reduce

    parts = torch.empty(3, 2**30 + 8, dtype=torch.float32, device="cuda")
    parts[:, -8:] = torch.arange(24.0, device="cuda").view(3, 8)
    out = torch.empty(parts.shape[1], device="cuda")
    count = out.numel()
    reduce.sum_parts_kernel[(-(-count // 1024),)](parts, out, count, 3, count, 3 * count, BLOCK=1024, num_warps=4)
    assert torch.equal(out[-8:], parts[:, -8:].sum(0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_on_another_device():
    t = map_inputs()
    expected = cross_selective_scan_packed(**t, paths=CROSS)
    other = cross_selective_scan_packed(**{name: m.detach().to("cuda:1") for name, m in t.items()}, paths=CROSS)
    assert torch.equal(other.cpu(), expected.cpu())
