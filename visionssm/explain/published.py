"""The maps as the code published with "The Hidden Attention of Mamba Models" (arXiv 2403.01590) computes them, for comparison only.

It differs from the paper's formulas, and from ours, in these points. The class token's row leaves out the class token's own
decay and its own element. Rollout adds that one row to every row of the identity, instead of each token's own. Attribution
takes the gradient of the residual stream before the mixer and not of the gated scan, the largest over the channels and not the
mean. Maps are scaled to 0..1 over channels and tokens before they are averaged.
"""

import torch
from torch import Tensor

from visionssm.errors import UserError
from visionssm.layers.vim_mixer import VimMixer

from .recording import Tape


def class_rows(tape: Tape, layer: int) -> Tensor:
    """The class token's row of one layer, per channel: `(batch, E, L)`, 0 at the class token.

    Tokens before the class token come from the forward scan, those after it from the backward one.

    Raises:
        UserError: no Vim, or no class token.
    """
    if not isinstance(tape.layers[0].mixer, VimMixer) or not tape.class_token:
        raise UserError("as_published: the published code knows Vim with a class token alone")
    return tape.attention(layer).without_decay_at("cls").rows("cls", channels="all")


def scale(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """To 0..1 over `axes`; all zeros where nothing varies."""
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def broadcast_rollout(tape: Tape, vectors: list[Tensor], layers: range) -> Tensor:
    """The class row of the product of (I + 1 a^T), each divided by its rows' sum, without the class token.

    Args:
        tape: of Vim.
        vectors: a `(batch, L)` of every layer.
        layers: which layers these are.

    Returns:
        `(batch, rows, columns)`.
    """
    layout = tape.layout(layers.start)
    row = layout.weights("cls", vectors[0]).expand_as(vectors[0])
    for vector in reversed(vectors):
        row = (row + row.sum(-1, keepdim=True) * vector) / (1.0 + vector.sum(-1, keepdim=True))
    return layout.to_map(row)


def raw(tape: Tape, layers: range) -> Tensor:
    """The mean over layers and channels of the scaled class rows, `(batch, rows, columns)`."""
    maps = [scale(class_rows(tape, index), (1, 2)).mean(1) for index in layers]
    return tape.layout(layers.start).to_map(torch.stack(maps).mean(0))


def attribution(tape: Tape, gradients: list[Tensor], layers: range) -> Tensor:
    """The rollout of the scaled positive class rows times the scaled positive gradients.

    Args:
        tape: of Vim.
        gradients: of the class's logit with respect to the residual stream that every layer reads, `(batch, L, dim)`.
        layers: which layers these are.

    Returns:
        `(batch, rows, columns)`.
    """
    vectors = []
    for index, gradient in zip(layers, gradients, strict=True):
        row = scale(class_rows(tape, index).clamp_min(0), (1, 2)).mean(1)
        vectors.append(row * scale(gradient.to(row.dtype).clamp_min(0).amax(-1), (1,)))
    return broadcast_rollout(tape, vectors, layers)
