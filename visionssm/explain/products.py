"""From the layers' attention to one map: raw rows and rollout, without any L x L matrix.

Between the stages of a hierarchy there is no attention matrix. There a map is carried from the coarser grid to the finer one
through the footprint of the downsampling: a token gets the mean of the coarser tokens whose 3x3 or 2x2 window covers it. That is
an approximation, which knows nothing of the convolution's weights; within a stage the products are exact.
"""

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from visionssm.errors import UserError
from visionssm.layers.patch_embed import ConvDownsample

from . import published
from .attention import Attention, recomputation
from .layout import Token
from .recording import Tape


def raw(
    tape: Tape,
    token: Token | None = None,
    start_layer: int | None = None,
    end_layer: int | None = None,
    include: str = "ssm",
    magnitude: bool = False,
    as_published: bool = False,
) -> Tensor:
    """Raw attention: a token's row, averaged over the layers from `start_layer` on (arXiv 2403.01590, section 3.3).

    Args:
        tape: from `record`.
        token: the token of the last layer whose row it is; None for the class token where the classifier reads it, else the mean
            of all. In the earlier stages of a hierarchy, the tokens that one covers.
        start_layer: the first layer; None for the late layers: from 5/8 of the depth, in a hierarchy from the start of that stage.
        end_layer: the layer to stop before; None for all.
        include: see `Attention`.
        magnitude: use the magnitudes of the elements, see `Attention.magnitude`.
        as_published: the published code's shortcuts, Vim only, see published.py; the other arguments but the layers do not matter.

    Returns:
        `(batch, rows, columns)` on the grid of `start_layer`.

    Raises:
        UserError: an unknown token or layer, nothing recorded, `as_published` without Vim's class token.
    """
    layers = layer_range(tape, late_layer(tape) if start_layer is None else start_layer, end_layer)
    if as_published:
        return published.raw(tape, layers)
    weights, total = last_row(tape, token, layers), None
    for index in reversed(layers):
        row = _attention(tape, index, include, magnitude).vector_product(weights)
        total = row if total is None else total + row
        if index > layers.start:
            weights, total = before(tape, index, weights), before(tape, index, total)
    return tape.layout(layers.start).to_map(total / len(layers))


def rollout(
    tape: Tape,
    token: Token | None = None,
    start_layer: int | None = None,
    end_layer: int | None = None,
    normalize: bool = True,
    include: str = "ssm",
    magnitude: bool = False,
    as_published: bool = False,
) -> Tensor:
    """Attention rollout: a token's row of the product of I + attention over the layers (arXiv 2403.01590, section 3.3).

    One or two scans and one transposed scan a layer, O(L E N) time and O(E L) memory. One map per stage of a hierarchy:
    `[rollout(tape, start_layer=s.start, end_layer=s.stop) for s in tape.stages]`.

    Args:
        tape: from `record`.
        token: as in `raw`, of the last layer of the product.
        start_layer: the first layer of the product; None for all layers, or the late ones if `as_published`.
        end_layer: the layer to stop before; None for all.
        normalize: divide every row of I + attention by 1 + `Attention.row_bound`, so that no map grows from layer to layer. The
            elements are signed, so that their sum would be no safe divisor.
        include: see `Attention`.
        magnitude: use the magnitudes of the elements, see `Attention.magnitude`.
        as_published: the published code's shortcuts, Vim only, see published.py; the other arguments but the layers do not matter.

    Returns:
        `(batch, rows, columns)` on the grid of `start_layer`.

    Raises:
        UserError: an unknown token or layer, nothing recorded, `as_published` without a class token.
    """
    if start_layer is None:
        start_layer = late_layer(tape) if as_published else 0
    layers = layer_range(tape, start_layer, end_layer)
    if as_published:
        vectors = [published.class_rows(tape, index).mean(1) for index in layers]
        return published.broadcast_rollout(tape, vectors, layers)
    return tape.layout(layers.start).to_map(rollout_row(tape, token, start_layer, end_layer, normalize, include, magnitude))


def rollout_row(
    tape: Tape,
    token: Token | None = None,
    start_layer: int = 0,
    end_layer: int | None = None,
    normalize: bool = True,
    include: str = "ssm",
    magnitude: bool = False,
) -> Tensor:
    """The row behind `rollout`, `(batch, L)` with the class token in its place; the arguments are the same."""
    layers = layer_range(tape, start_layer, end_layer)
    row = last_row(tape, token, layers)
    for index in reversed(layers):
        attention = _attention(tape, index, include, magnitude)
        if normalize:
            row = row / (1.0 + attention.row_bound())
        row = row + attention.vector_product(row)
        if index > layers.start:
            row = before(tape, index, row)
    return row


def late_layer(tape: Tape) -> int:
    """The first of the late layers: 5/8 of the depth (15 of 24 as published), in a hierarchy the start of that layer's stage."""
    layer = len(tape) * 5 // 8
    stages = tape.stages
    return layer if len(stages) == 1 else next(stage.start for stage in stages if layer in stage)


def layer_range(tape: Tape, start: int, end: int | None) -> range:
    """The layers from `start` until before `end`, both checked."""
    start = tape.check_layer(start)
    end = len(tape) if end is None else end
    if type(end) is not int or not start < end <= len(tape):
        raise UserError(f"end_layer: got {end!r}, expected a number from {start + 1} to {len(tape)} (the layer to stop before)")
    return range(start, end)


def to_finer_grid(downsample: nn.Module, coarse: Tensor, grid: tuple[int, int]) -> Tensor:
    """Give every token of a finer `grid` the mean of the tokens of `coarse` `(batch, h, w)` whose windows cover it.

    The result `(batch, H, W)` is divided by H W / (h w): shares of a whole stay shares.
    """
    windows = {ConvDownsample: (3, 2, 1, False), PatchMerging: (2, 2, 0, True)}  # size, stride, padding, partial windows
    if type(downsample) not in windows:
        raise UserError(f"tape: the footprint of a {type(downsample).__name__} is not known; stay within one of tape.stages")
    size, stride, padding, partial = windows[type(downsample)]
    with recomputation(coarse), torch.enable_grad():
        fine = torch.zeros(coarse.shape[0], 1, *grid, dtype=coarse.dtype, device=coarse.device, requires_grad=True)
        covered = F.avg_pool2d(fine, size, stride, padding, ceil_mode=partial, divisor_override=1)  # sums over the windows
        total, count = (
            torch.autograd.grad(covered, fine, m.unsqueeze(1), retain_graph=True)[0] for m in (coarse, torch.ones_like(coarse))
        )
    return (total / count).squeeze(1) * (coarse[0].numel() / (grid[0] * grid[1]))


def last_row(tape: Tape, token: Token | None, layers: range) -> Tensor:
    """The weights of the last layer's rows, `(batch, L)`: where a product over `layers` begins."""
    attention = tape.attention(layers[-1])
    return attention.weights(tape.default_token if token is None else token).expand(attention.batch, -1)


def _attention(tape: Tape, index: int, include: str, magnitude: bool) -> Attention:
    attention = tape.attention(index).include(include)
    return attention.magnitude() if magnitude else attention


def before(tape: Tape, index: int, row: Tensor) -> Tensor:
    """A row over the tokens that layer `index` reads as one over the tokens that the layer before it wrote."""
    if tape.layers[index].stage == tape.layers[index - 1].stage:
        return row
    grid = tape.layout(index - 1).grid
    return to_finer_grid(tape.layers[index].downsample, tape.layout(index).to_map(row), grid).flatten(1)
