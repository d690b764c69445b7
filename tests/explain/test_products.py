"""Raw maps, rollout and attribution against explicit matrices; the published shortcuts against what they say they are."""

import pytest
import torch
import torch.nn.functional as F
from small_models import build
from torch.testing import assert_close

from visionssm.errors import UserError
from visionssm.explain import attribution, raw, record, rollout, rollout_row
from visionssm.explain.class_attribution import class_gradients, weighted_product
from visionssm.explain.products import late_layer, to_finer_grid
from visionssm.layers.patch_embed import ConvDownsample

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def taped(kind):
    model, images = build(kind)
    with record(model) as tape, torch.no_grad():
        model(images)
    return tape


def footprint(tape, layer):
    """The explicit matrix (coarse, fine) that gives a fine token the mean of the coarse ones whose windows cover it."""
    (h, w), (height, width) = tape.layout(layer).grid, tape.layout(layer - 1).grid
    size, padding = (3, 1) if isinstance(tape.layers[layer].downsample, ConvDownsample) else (2, 0)
    covers = torch.zeros(h, w, height, width, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            rows = [r for r in range(2 * y - padding, 2 * y - padding + size) if 0 <= r < height]
            columns = [c for c in range(2 * x - padding, 2 * x - padding + size) if 0 <= c < width]
            covers[y, x, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1.0
    covers = covers.flatten(2).flatten(0, 1)
    return covers / covers.sum(0) * h * w / (height * width)


def explicit_product(tape, layers, factor):
    """The product of `factor(layer)` over the layers, with the footprints between the stages."""
    product = None
    for index in layers:
        matrix = factor(index)
        if product is not None:
            crosses = tape.layers[index].stage != tape.layers[index - 1].stage
            product = matrix @ (footprint(tape, index) @ product if crosses else product)
        else:
            product = matrix
    return product


@pytest.mark.parametrize("include", ["ssm", "ssm+skip"])
@pytest.mark.parametrize("normalize", [True, False])
def test_rollout_is_the_product_of_matrices(kind, include, normalize):
    tape = taped(kind)

    def factor(index):
        attention = tape.attention(index).include(include)
        matrix = torch.eye(attention.layout.tokens, dtype=torch.float64) + attention.matrix()
        if normalize:
            matrix = matrix / (1 + attention.row_bound()[..., None])
            assert (matrix.abs().sum(-1) <= 1 + 1e-9).all()
        return matrix

    product = explicit_product(tape, range(len(tape)), factor)
    for token in ("mean", (0, 1), tape.default_token):
        weights = tape.layout(-1).weights(token, product)
        expected = torch.einsum("i,bij->bj", weights, product)
        assert_close(rollout_row(tape, token, normalize=normalize, include=include), expected, **EXACT)
        actual = rollout(tape, token, normalize=normalize, include=include)
        assert_close(actual, tape.attention(0).to_map(expected), **EXACT)
    assert actual.shape == (2, *tape.layout(0).grid)


def test_rollout_of_the_mixer(kind):
    tape = taped(kind)
    product = explicit_product(
        tape, range(len(tape)), lambda i: torch.eye(tape.layout(i).tokens).double() + tape.attention(i).include("mixer").matrix()
    )
    expected = torch.einsum("i,bij->bj", tape.layout(-1).weights("mean", product), product)
    assert_close(rollout_row(tape, "mean", normalize=False, include="mixer"), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(UserError, match="normalize"):
        rollout(tape, include="mixer")


def test_stages_and_ranges():
    tape = taped("vmamba")
    assert tape.stages == [range(1), range(1, 2)]
    maps = [rollout(tape, start_layer=stage.start, end_layer=stage.stop) for stage in tape.stages]
    assert [tuple(m.shape[1:]) for m in maps] == [(7, 9), (4, 5)]
    assert_close(maps[1], rollout(tape, start_layer=-1), **EXACT)
    for start, end, message in (
        (0, 0, "end_layer: got 0"),
        (1, 1, "end_layer"),
        (0, 3, "end_layer: got 3"),
        (2, None, "layer: got 2"),
    ):
        with pytest.raises(UserError, match=message):
            rollout(tape, start_layer=start, end_layer=end)


@pytest.mark.parametrize("kind", ["vmamba", "vanilla_vmamba"])
def test_footprints(kind):
    tape = taped(kind)
    coarse = torch.rand(2, *tape.layout(1).grid, dtype=torch.float64)
    fine = to_finer_grid(tape.layers[1].downsample, coarse, tape.layout(0).grid)
    assert_close(fine.flatten(1), coarse.flatten(1) @ footprint(tape, 1), **EXACT)
    even = to_finer_grid(tape.layers[1].downsample, torch.full_like(coarse, 1 / coarse[0].numel()), tape.layout(0).grid)
    assert_close(even, torch.full_like(even, 1 / even[0].numel()), **EXACT)
    with pytest.raises(UserError, match="footprint of a Linear is not known"):
        to_finer_grid(torch.nn.Linear(1, 1), coarse, (3, 3))


def test_rollout_of_magnitudes(kind):
    tape = taped(kind)

    def factor(index):
        attention = tape.attention(index)
        parts = [attention.direction(k).magnitude().matrix(channels="all") for k in range(len(attention.paths))]
        signed = [attention.direction(k).matrix(channels="all") for k in range(len(attention.paths))]
        for part, true in zip(parts, signed, strict=True):
            if kind == "vmamba":  # one state
                assert_close(part, true.abs(), **EXACT)
            assert (part >= true.abs() * (1 - 1e-9)).all()
        matrix = torch.eye(attention.layout.tokens, dtype=torch.float64) + sum(parts).mean(2)
        return matrix / matrix.sum(-1, keepdim=True)

    product = explicit_product(tape, range(len(tape)), factor)
    expected = torch.einsum("i,bij->bj", tape.layout(-1).weights("mean", product), product)
    assert_close(rollout_row(tape, "mean", magnitude=True), expected, **EXACT)
    with pytest.raises(UserError, match="magnitude"):
        rollout(tape, include="mixer", magnitude=True)


def test_raw_is_the_mean_row(kind):
    tape = taped(kind)
    weights, expected = None, 0.0
    for index in reversed(range(len(tape))):
        if weights is None:
            weights = tape.layout(index).weights(tape.default_token, torch.ones((), dtype=torch.float64)).expand(2, -1)
        elif tape.layers[index].stage != tape.layers[index + 1].stage:
            weights, expected = (m @ footprint(tape, index + 1) for m in (weights, expected))
        expected = expected + torch.einsum("bi,bij->bj", weights, tape.attention(index).matrix())
    assert_close(raw(tape, start_layer=0), tape.attention(0).to_map(expected / len(tape)), **EXACT)
    assert_close(raw(tape), raw(tape, start_layer=late_layer(tape)), **EXACT)


def test_late_layers():
    assert late_layer(taped("vim")) == 1
    tape = taped("vmamba")
    assert late_layer(tape) == tape.stages[1].start


def test_attribution_is_the_product_of_matrices(kind):
    model, images = build(kind)
    target = torch.tensor([3, 1])
    gated = []
    handles = [
        m.out_proj.register_forward_pre_hook(lambda m, args: gated.append(args[0]))
        for m in model.modules()
        if hasattr(m, "out_proj")
    ]
    with record(model) as tape:
        logits = model(images)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits[0, 3] + logits[1, 1], gated)

    def factor(index):
        weight = gradients[index].flatten(1, -2).mean(-1)
        matrix = (weight[..., None] * tape.attention(index).matrix()).clamp(min=0)
        assert matrix.any()
        return torch.eye(matrix.shape[-1], dtype=torch.float64) + matrix

    product = explicit_product(tape, range(len(tape)), factor)
    expected = torch.einsum("i,bij->bj", tape.layout(-1).weights(tape.default_token, product), product)
    with torch.inference_mode():
        actual = attribution(model, images, target, start_layer=0, block=7)
    assert_close(actual, tape.attention(0).to_map(expected), **EXACT)
    assert (actual >= 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_attribution_of_the_predicted_class():
    model, images = build("vim")
    model.requires_grad_(False)
    predicted = model(images).argmax(1)
    assert_close(attribution(model, images), attribution(model, images, predicted), **EXACT)
    for target, message in (
        (5, "target: class 5 is out of range; the model has 5 classes"),
        (-1, "target: class -1 is out of range"),
        (torch.tensor([0, 7]), "target: class 7"),
        (torch.tensor([0, 1, 2]), "target: expected a class, or one for each of 2 images"),
        (0.5, "target: expected a class"),
        ("cat", "target: expected a class, or one for each of 2 images, got 'cat'"),
        ([None, 1], r"target: expected a class, or one for each of 2 images, got \[None, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            attribution(model, images, target)
    model.reset_classifier(0)
    with pytest.raises(UserError, match="model: expected logits"):
        attribution(
            model.__class__(img_size=32, patch_size=4, depth=1, embed_dim=32, num_classes=0, global_pool=""), images.float()
        )


def test_attribution_of_a_model_without_logits():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, _ = build("vim")

        def forward(self, images):
            return {"logits": self.model(images)}

    with pytest.raises(UserError, match=r"model: expected logits \(batch, classes\), got a dict"):
        attribution(Wrapper(), build("vim")[1])


def test_autocast_around_the_caller(kind):
    """What follows from a recording and its gradients is rounded by no autocast."""
    tape, layers, gradients = class_gradients(*build(kind, torch.float32), 1, start_layer=0)
    large = [gradient / gradient.abs().mean() for gradient in gradients]

    def maps():
        mixer = rollout(tape, include="mixer", normalize=False)
        return [weighted_product(tape, layers, large), rollout(tape), raw(tape, magnitude=True), mixer]

    expected = maps()
    with torch.autocast("cpu", torch.bfloat16):
        actual = maps()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# --- the published shortcuts ------------------------------------------------------------------------------------------------------


def published_rows(tape, index):
    """The class token's row without its own decay and its own element, (batch, E, L)."""
    attention, token = tape.attention(index), tape.layout(index).class_index
    rows = attention.rows("cls", channels="all")
    mixer, x = tape.layers[index].mixer, tape.layers[index].inputs[0]
    with torch.no_grad():
        _, x_dbl, _ = mixer.scan_inputs(x)
    n = mixer.A_logs.shape[-1]
    dt, B, C = x_dbl[:, 0].split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)  # [B, L, 2, .]
    dt = F.softplus(torch.einsum("blkr,ker->bkle", dt, mixer.dt_projs_weight) + mixer.dt_projs_bias[:, None]).detach()
    dt[:, :, token] = 0.0
    A, total = -mixer.A_logs.detach().exp(), torch.zeros_like(rows)
    for k, order in ((0, range(token)), (1, range(token + 1, rows.shape[-1]))):
        for j in order:
            between = dt[:, k, j + 1 : token] if k == 0 else dt[:, k, token + 1 : j]
            decay = torch.exp(A[k] * between.sum(1)[..., None])
            total[:, :, j] = dt[:, k, j] * torch.einsum("bn,bn,ben->be", C[:, token, k], B[:, j, k], decay)
    return total


def scaled(m):
    low, high = m.flatten(1).min(1).values, m.flatten(1).max(1).values
    shape = (-1,) + (1,) * (m.dim() - 1)
    return (m - low.view(shape)) / (high - low).view(shape)


def published_product(vectors):
    tokens = vectors[0].shape[-1]
    product = torch.eye(tokens, dtype=torch.float64)
    for vector in vectors:
        matrix = torch.eye(tokens, dtype=torch.float64) + vector[:, None]
        product = matrix / matrix.sum(-1, keepdim=True) @ product
    row, token = product[:, (tokens - 1) // 2], (tokens - 1) // 2
    return torch.cat([row[:, :token], row[:, token + 1 :]], dim=-1).unflatten(-1, (5, 7))


def test_as_published():
    model, images = build("vim")
    streams = []
    handles = [block.register_forward_pre_hook(lambda m, args: streams.append(args[0])) for block in model.layers]
    with record(model) as tape:
        logits = model(images)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits[:, 2].sum(), streams)
    rows = [published_rows(tape, index) for index in range(2)]
    drop = lambda row: torch.cat([row[:, :17], row[:, 18:]], dim=-1).unflatten(-1, (5, 7))  # noqa: E731
    expected = drop(torch.stack([scaled(row).mean(1) for row in rows]).mean(0))
    assert_close(raw(tape, start_layer=0, as_published=True), expected, **EXACT)
    assert_close(rollout(tape, start_layer=0, as_published=True), published_product([row.mean(1) for row in rows]), **EXACT)
    weights = [scaled(g.clamp(min=0).amax(-1)) for g in gradients]
    vectors = [scaled(row.clamp(min=0)).mean(1) * weight for row, weight in zip(rows, weights, strict=True)]
    assert_close(attribution(model, images, 2, start_layer=0, as_published=True), published_product(vectors), **EXACT)
    assert not torch.allclose(rollout(tape, as_published=True), rollout(tape))


def test_as_published_is_for_vim():
    for kind in ("vmamba", "local_vim_cls"):
        with pytest.raises(UserError, match="as_published: the published code knows Vim"):
            rollout(taped(kind), as_published=True)
