"""The matrices are what the models compute: against formulas written out, the reference scan, and the models' own tensors."""

import pytest
import torch
import torch.nn.functional as F
from small_models import MODELS, build
from torch.testing import assert_close

from visionssm.explain import record
from visionssm.explain.attention import INCLUDES
from visionssm.layers.ssm_init import A_from_log
from visionssm.models.local_vim import LocalVimMixer, scan_paths
from visionssm.ops import ScanPaths, cross_merge_ref, cross_selective_scan_ref

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def recorded(kind):
    """A tape, and for every layer what its mixer got and what its out_proj got."""
    model, images = build(kind)
    gated = []
    with record(model) as tape:
        hooks = [layer.mixer.out_proj.register_forward_pre_hook(lambda m, args: gated.append(args[0])) for layer in tape.layers]
        with torch.no_grad():
            model(images)
    for hook in hooks:
        hook.remove()
    return tape, gated


def scan_parts(mixer, inputs):
    """v and x_dbl per path, in path order: v (batch, K, L', E), x_dbl (batch, K, L', .), the paths, the padded steps (K, L')."""
    if isinstance(mixer, LocalVimMixer):
        x, size = inputs
        paths = scan_paths(mixer.paths, size, mixer.class_token)
        v, x_dbl, _ = mixer.scan_inputs(x, paths)
        return v, x_dbl, paths, torch.from_numpy(paths.table.copy())
    v, x_dbl, _ = mixer.scan_inputs(*inputs)
    height, width = x_dbl.shape[1:3]
    paths = ScanPaths(mixer.paths, (height, width))
    table = torch.from_numpy(paths.table.copy())
    maps = v if v.dim() == 5 else v.unsqueeze(1).expand(-1, len(paths), -1, -1, -1)
    read = lambda m: F.pad(m.flatten(2, 3), (0, 0, 0, 1))  # noqa: E731  # index -1 reads zeros
    gather = lambda m: torch.stack([read(m)[:, k, table[k]] for k in range(len(paths))], dim=1)  # noqa: E731
    return gather(maps), gather(x_dbl.permute(0, 3, 1, 2, 4)), paths, table


def written_out(mixer, inputs):
    """alpha by its formula, with the sums of the steps: (batch, K, P, E, P) in raster order."""
    _, x_dbl, paths, table = scan_parts(mixer, inputs)
    A = A_from_log(mixer.A_logs)
    n = A.shape[-1]
    dt, B, C = x_dbl.split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)
    dt = F.softplus(torch.einsum("bklr,ker->bkle", dt, mixer.dt_projs_weight) + mixer.dt_projs_bias[:, None])
    S = dt.cumsum(2)
    decay = torch.exp(torch.einsum("ken,bkije->bkijen", A, S[:, :, :, None] - S[:, :, None]).clamp(max=0))
    alpha = torch.einsum("bkje,bkin,bkjn,bkijen->bkiej", dt, C, B, decay)
    alpha = alpha * torch.ones(alpha.shape[2], alpha.shape[2]).tril()[:, None].to(alpha)
    raster = torch.zeros(*alpha.shape[:2], paths.positions, alpha.shape[3], paths.positions, dtype=alpha.dtype)
    for k in range(len(paths)):
        steps = (table[k] >= 0).nonzero()[:, 0]
        raster[:, k, table[k][steps][:, None], :, table[k][steps]] = alpha[:, k, steps][..., steps].permute(1, 3, 0, 2)
    return raster


@pytest.mark.parametrize("layer", [0, -1])
def test_matrix_is_the_formula(kind, layer):
    tape, _ = recorded(kind)
    with torch.no_grad():
        expected = written_out(tape.layers[layer].mixer, tape.layers[layer].inputs)
    attention = tape.attention(layer)
    assert expected.abs().max() > 1e-2
    assert_close(attention.matrix(channels="all"), expected.sum(1), **EXACT)
    assert_close(attention.matrix(block=5), expected.sum(1).mean(2), **EXACT)
    for k in range(len(attention.paths)):
        assert_close(attention.direction(k).matrix(), expected[:, k].mean(2), **EXACT)


def test_matrix_times_v_is_the_scan(kind):
    """alpha v + D v = the output of the specifying scan, path by path; padded steps of LocalVim hold values, here set to 0."""
    tape, _ = recorded(kind)
    mixer, inputs = tape.layers[-1].mixer, tape.layers[-1].inputs
    with torch.no_grad():
        v, x_dbl, paths, table = scan_parts(mixer, inputs)
        v = v * (table >= 0)[:, :, None]
        n = mixer.A_logs.shape[-1]
        dt, B, C = x_dbl.split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)
        y = cross_selective_scan_ref(
            v, dt, A_from_log(mixer.A_logs), B, C, mixer.Ds,
            paths=paths, dt_weight=mixer.dt_projs_weight, dt_bias=mixer.dt_projs_bias, order="scan",
        )  # fmt: skip
        y, v = (cross_merge_ref(m, paths, merge=False) for m in (y, v))
        y, v = (m if paths.token_at is not None else m.flatten(2, 3) for m in (y, v))
    for k in range(len(paths)):
        one = tape.attention(-1).direction(k)
        product = torch.einsum("biej,bje->bie", one.matrix(channels="all"), v[:, k])
        assert_close(product + mixer.Ds[k] * v[:, k], y[:, k], **EXACT)
        assert_close(torch.einsum("biej,bje->bie", one.include("ssm+skip").matrix(channels="all"), v[:, k]), y[:, k], **EXACT)
        assert_close(one.include("ssm+skip").apply(v[:, k]), y[:, k], **EXACT)


def test_whole_mixer(kind):
    """With the convolution's bias 0 the "mixer" matrix times u is what out_proj receives, up to the norm's centring and bias."""
    model, images = build(kind)
    for name, parameter in model.named_parameters():
        if name.endswith(("conv1d_bias", "conv2d.bias", "out_norm.bias")):
            parameter.data.zero_()
    normed, gated = [], []
    with record(model) as tape:
        mixer = tape.layers[-1].mixer
        mixer.out_proj.register_forward_pre_hook(lambda m, args: gated.append(args[0].flatten(1, -2)))
        if hasattr(mixer, "out_norm"):
            mixer.out_norm.register_forward_pre_hook(lambda m, args: normed.append(args[0].flatten(1, -2)))
        with torch.no_grad():
            model(images)
            u, z = mixer.branches(tape.layers[-1].inputs[0])
    u = u.flatten(1, -2)
    attention = tape.attention(-1).include("mixer")
    expected = gated[-1].clone()
    if normed:  # LayerNorm subtracts the mean over the channels, which no matrix of one channel can
        y = normed[-1]
        centre = y.mean(-1, keepdim=True) * (y.var(-1, unbiased=False, keepdim=True) + mixer.out_norm.eps).rsqrt()
        expected += centre * mixer.out_norm.weight * (1.0 if z is None else F.silu(z.flatten(1, 2)))
    else:
        expected *= 0.5 if kind == "vim" else 1.0
    assert expected.abs().max() > 1e-2
    assert_close(torch.einsum("biej,bje->bie", attention.matrix(channels="all"), u), expected, rtol=1e-8, atol=1e-10)
    assert_close(attention.apply(u), expected, rtol=1e-8, atol=1e-10)
    parts = [attention.direction(k) for k in range(len(attention.paths))]
    assert_close(sum(part.apply(u) for part in parts), expected, rtol=1e-8, atol=1e-10)


def test_rows_are_autograd_rows(kind):
    """Through the differentiable reference, dt, B and C held fixed."""
    tape, _ = recorded(kind)
    layer, attention = tape.layers[0], tape.attention(0)
    v, x_dbl, paths, _ = scan_parts(layer.mixer, layer.inputs)
    n = layer.mixer.A_logs.shape[-1]
    v = v.detach().requires_grad_()
    dt, B, C = x_dbl.detach().split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)
    y = cross_selective_scan_ref(
        v, dt, A_from_log(layer.mixer.A_logs.detach()), B, C, paths=paths,
        dt_weight=layer.mixer.dt_projs_weight.detach(), dt_bias=layer.mixer.dt_projs_bias.detach(), order="scan",
    )  # fmt: skip
    flat = cross_merge_ref(y, paths).reshape(2, paths.positions, -1)
    token = paths.positions // 2
    (grad,) = torch.autograd.grad(flat[:, token].sum(), v)
    expected = cross_merge_ref(grad, paths).reshape(2, paths.positions, -1).mT
    assert_close(attention.rows(token, channels="all"), expected, **EXACT)
    assert_close(attention.rows([token, 0], channels=slice(1, 4))[:, 0], expected[:, 1:4], **EXACT)
    assert_close(attention.rows(token, channels=[2, 0]), expected[:, [2, 0]], **EXACT)
    assert_close(attention.rows(token, channels=slice(2, None, -1)), expected[:, [2, 1, 0]], **EXACT)
    assert_close(attention.rows(token), expected.mean(1), **EXACT)


@pytest.mark.parametrize("include", INCLUDES)
def test_products_and_bounds(kind, include):
    tape, _ = recorded(kind)
    attention = tape.attention(0).include(include)
    matrix, full = attention.matrix(), attention.matrix(block=3, channels="all")
    assert_close(full.mean(2), matrix, **EXACT)
    vector = torch.randn(2, attention.layout.tokens, dtype=torch.float64)
    assert_close(attention.vector_product(vector), torch.einsum("bi,bij->bj", vector, matrix), **EXACT)
    mean = attention.layout.weights("mean", matrix)
    assert_close(attention.rows("mean"), torch.einsum("i,bij->bj", mean, matrix), **EXACT)
    if include != "mixer":
        assert (full.abs().sum(-1).mean(-1) <= attention.row_bound() * (1 + 1e-9)).all()
    if include == "ssm" and kind == "vmamba":  # one state: the bound is the sum of magnitudes of every path and channel
        parts = [attention.direction(k).matrix(channels="all").abs().sum(-1).mean(-1) for k in range(4)]
        assert_close(attention.row_bound(), sum(parts), **EXACT)


@pytest.mark.parametrize("include", INCLUDES)
def test_paths_one_after_the_other(kind, include, monkeypatch):
    """Where one path's steps fill a block of memory, the paths are not pulled at once."""
    tape, _ = recorded(kind)
    attention = tape.attention(0).include(include)
    together = attention.rows([0, "mean"], channels=slice(3))
    monkeypatch.setattr("visionssm.explain.attention._BLOCK_ELEMENTS", 1)
    assert_close(attention.rows([0, "mean"], channels=slice(3)), together, **EXACT)


def test_paths_of_the_models():
    """What these tests call every path."""
    names = {name for _, arguments, _ in MODELS.values() for paths in arguments.get("paths", ()) for name in paths}
    assert {"h", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip"} <= names


def test_recomputed_scan_is_the_models(kind):
    """The left factor and the scan that `mixer` rests on are bit-equal to the model's own forward."""
    tape, gated = recorded(kind)
    mixer, inputs = tape.layers[0].mixer, tape.layers[0].inputs
    with torch.no_grad():
        again = mixer(*inputs)
    assert torch.equal(mixer.out_proj(gated[0]) * (0.5 if kind == "vim" else 1.0), again)


@pytest.mark.parametrize("bias", [-200.0, -60.0, 60.0])
def test_extreme_steps(kind, bias):
    """Steps that underflow to 0, and steps that forget everything, in float32."""
    model, images = build(kind, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_projs_bias"):
                parameter.fill_(bias)
    with record(model) as tape, torch.no_grad():
        model(images)
    attention = tape.attention(0)
    matrix = attention.matrix()
    with torch.no_grad():
        columns = torch.eye(attention.layout.tokens).unsqueeze(-1).expand(-1, -1, attention.channels)
        explicit = torch.stack([attention.apply(column.expand(2, -1, -1)).mean(-1) for column in columns], dim=-1)
    assert matrix.isfinite().all()
    assert_close(matrix, explicit, rtol=1e-4, atol=1e-5 * max(explicit.abs().max().item(), 1e-30))


def test_single_token():
    model, _ = build("vmamba")
    with record(model) as tape, torch.no_grad():
        model(torch.randn(2, 3, 2, 2, dtype=torch.float64))
    attention = tape.attention(0)
    assert attention.layout.grid == (1, 1)
    assert_close(attention.rows("mean"), attention.apply(torch.ones(2, 1, 16, dtype=torch.float64)).mean(-1), **EXACT)
