"""Which backend is chosen, and what is said when it is not the best."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from visionssm.ops import backends


def on_gpu(dtype):
    """What the choice looks at of a GPU tensor, on a machine that may have no GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_default_on_a_cpu():
    assert backends.choose_backend(torch.ones(1)) == "chunked"


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_by_name(name):
    assert backends.choose_backend(torch.ones(1), name) == name
    assert backends.choose_backend(on_gpu(torch.float64), name) == name


def test_best_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "can_run_triton", lambda x, **operands: None)
    assert backends.choose_backend(on_gpu(torch.bfloat16)) == "triton"
    assert backends.choose_backend(on_gpu(torch.bfloat16), "triton") == "triton"


def test_a_slow_fallback_on_a_gpu_warns_once():
    backends._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"takes the slow chunked backend because .*torch\.float64"):
        assert backends.choose_backend(on_gpu(torch.float64)) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(on_gpu(torch.float64)) == "chunked"


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ({"A": torch.ones(2, 65)}, "A has 65 state variables, and the Triton kernels take up to 64"),
        ({"A": torch.ones(2, 3, dtype=torch.float64), "D": None}, r"take float16.*float32, and A is torch\.float64"),
        ({"A": torch.ones(2, 3), "D": torch.ones(2, dtype=torch.float64)}, r"and D is torch\.float64"),
        ({"dt_weight": torch.ones(1, 2, 257)}, "dt_weight has rank 257, and the Triton kernels take up to 256, or a full step"),
    ],
    ids=["states", "A", "D", "rank"],
)
def test_operands_that_triton_cannot_take(monkeypatch, operands, reason):
    monkeypatch.setattr(backends, "_device_refusal", lambda kind, index: None)
    backends._warn_slow.cache_clear()
    x = on_gpu(torch.float32)
    assert backends.choose_backend(x, A=torch.ones(2, 64), dt_weight=torch.ones(1, 2, 256)) == "triton"
    with pytest.raises(RuntimeError, match=f"backend: 'triton' cannot run here: .*{reason}"):
        backends.choose_backend(x, "triton", **operands)
    with pytest.warns(RuntimeWarning, match=f"a GPU tensor takes the slow chunked backend because .*{reason}"):
        assert backends.choose_backend(x, **operands) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(x, **operands) == "chunked"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_slow_fallback_compiles_in_one_graph(monkeypatch, dynamic):
    """The warning, which names a number of states that may be symbolic, is given while compiling."""
    monkeypatch.setattr(backends, "_device_refusal", lambda kind, index: None)
    backends._warn_slow.cache_clear()
    torch._dynamo.reset()

    def choose(x, A):
        backends._tell_slow(backends.can_run_triton(x, A=A))
        return x + 1

    compiled = torch.compile(choose, fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.warns(RuntimeWarning, match="A has 65 state variables"):
        assert compiled(torch.zeros(1), torch.ones(2, 65)) == 1


def test_report_gives_a_reason_for_every_backend_that_cannot_run():
    report = backends.backend_report(torch.ones(1, dtype=torch.float64))
    assert tuple(report) == backends.BACKENDS
    assert report["reference"] is None
    assert report["chunked"] is None
    assert "float64" in report["triton"]
