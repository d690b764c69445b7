"""Class-specific attribution: hidden attention weighted by the gradient of a class (arXiv 2403.01590, section 3.3)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionssm.errors import UserError

from . import published
from .attention import Attention, recomputation
from .layout import Token
from .products import before, last_row, late_layer, layer_range
from .recording import Tape, record


def attribution(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    token: Token | None = None,
    start_layer: int | None = None,
    block: int | None = None,
    as_published: bool = False,
) -> Tensor:
    """Mamba attribution: a token's row of the product over the layers of I + (g * alpha)^+, for one class.

    alpha is the attention averaged over the channels. g_i is the gradient of the class's logit with respect to the gated scan
    (what out_proj receives) at token i, averaged over the channels too; it weights the whole row i. The positive part is taken
    element by element, so that rows have to be computed: O(L^2 E N) time, in blocks of memory O(L).

    Args:
        model: a classifier of the zoo. It is run once; its parameters' gradients are left alone.
        images: `(batch, channels, H, W)`.
        target: the class, one for all images or one each `(batch,)`; None for the predicted one.
        token: as in `raw`.
        start_layer: the first layer of the product; None for the late layers, as in `raw`.
        block: rows of a matrix computed at once; None for as many as keep an intermediate map within 2^24 elements.
        as_published: the published code's shortcuts, Vim only, see published.py.

    Returns:
        `(batch, rows, columns)` on the grid of `start_layer`, not negative.

    Raises:
        UserError: a model that cannot be recorded, a class, token or layer that is not there.
    """
    tape, layers, gradients = class_gradients(model, images, target, start_layer, of_stream=as_published)
    if as_published:
        return published.attribution(tape, gradients, layers)
    return weighted_product(tape, layers, gradients, token, block)


def class_gradients(
    model: nn.Module, images: Tensor, target: int | Tensor | None, start_layer: int | None, of_stream: bool = False
) -> tuple[Tape, range, list[Tensor]]:
    """Run the model and differentiate the class's logit; the arguments are those of `attribution`.

    Returns:
        The recording, the layers of the product, and for each of them the gradient with respect to the gated scan, `(batch, L, E)`
        or `(batch, h, w, E)`; `of_stream` to the residual stream that its block reads.
    """
    with torch.inference_mode(False), torch.enable_grad(), record(model) as tape:
        layers = layer_range(tape, late_layer(tape) if start_layer is None else start_layer, None)
        with _taps(tape, layers) as taps:
            logits = model(images.clone().requires_grad_())
        classes = check_target(logits, target)
        chosen = logits.gather(1, classes.unsqueeze(1)).sum()
        wanted = [tap.stream if of_stream else tap.gated for tap in taps]
        return tape, layers, list(torch.autograd.grad(chosen, wanted))


def weighted_product(
    tape: Tape, layers: range, gradients: list[Tensor], token: Token | None = None, block: int | None = None
) -> Tensor:
    """The map that follows from a recording and from the gradients of its gated scans, see `attribution`."""
    row = last_row(tape, token, layers)
    for index, gradient in zip(reversed(layers), reversed(gradients), strict=True):
        weight = gradient.to(row.dtype).mean(-1).flatten(1)  # [B, L]
        row = row + _positive_product(tape.attention(index), row, weight, block)
        if index > layers.start:
            row = before(tape, index, row)
    return tape.layout(layers.start).to_map(row)


def check_target(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of every image, `(batch,)`; that of the largest logit where `target` is None.

    Raises:
        UserError: no logits, or a class that is not there.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.shape[1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"model: expected logits (batch, classes), got {got}; it needs a classifier")
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        index = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError):  # words, None among numbers, nested lists
        index = None
    if index is None or index.is_floating_point() or index.dtype == torch.bool or index.shape not in ((), (batch,)):
        raise UserError(f"target: expected a class, or one for each of {batch} images, got {target!r}")
    wrong = index[(index < 0) | (index >= classes)]
    if wrong.numel():
        number = int(wrong.flatten()[0])
        raise UserError(f"target: class {number} is out of range; the model has {classes} classes, 0 to {classes - 1}")
    return index.long().expand(batch)


@dataclass
class _Tap:
    """What one layer computed on the way to the logits: the gated scan, and the residual stream that its block reads."""

    gated: Tensor | None = None
    stream: Tensor | None = None


@contextlib.contextmanager
def _taps(tape: Tape, layers: range) -> Iterator[list[_Tap]]:
    """Filled by the forward pass inside the context."""
    taps = [_Tap() for _ in layers]
    with contextlib.ExitStack() as stack:
        for index, tap in zip(layers, taps, strict=True):
            layer = tape.layers[index]

            def keep_gated(module: nn.Module, args: tuple[Tensor], tap: _Tap = tap) -> None:
                tap.gated = args[0]

            def keep_stream(module: nn.Module, args: tuple, tap: _Tap = tap) -> None:
                tap.stream = args[0]

            block = tape.network.get_submodule(layer.name.rpartition(".")[0])
            stack.callback(layer.mixer.out_proj.register_forward_pre_hook(keep_gated).remove)
            stack.callback(block.register_forward_pre_hook(keep_stream).remove)
        yield taps


def _positive_product(attention: Attention, row: Tensor, weight: Tensor, block: int | None) -> Tensor:
    """`row` (batch, L) times the positive part of diag(`weight`) attention."""
    first = 0
    with recomputation(row):
        total = torch.zeros_like(row)
        for rows in attention.blocks(block):
            part = slice(first, first + rows.shape[1])
            total += torch.einsum("bi,bij->bj", row[:, part], (weight[:, part, None] * rows).clamp_min_(0))
            first = part.stop
    return total
