"""Counting floating-point operations, the scans included.

Generic counters skip the scan: to them it is one unknown operator. Importing this module tells PyTorch's counter,
`torch.utils.flop_counter.FlopCounterMode`, what our operators cost; after that a plain

    with FlopCounterMode() as counter:
        model(images).sum().backward()

counts them too. That counter takes matrix products and convolutions, two FLOPs for each multiply-add, and nothing elementwise
(norms, activations, gates, sums of paths). `count_flops` uses it, and also gives the number that published tables call "FLOPs".

Two counts of one scan. Ours is what the recurrence needs, for each image, path, step (window padding included) and channel, with N
states and a step of low rank R; an exponential, a logarithm and a division count as one:

    dt_weight dt           2 R      only for a low-rank step        delta B x        1 + N    delta x once, then times B
    + dt_bias              1        only with a bias                exp(delta A)     2 N      product, exponential
    softplus               3        exponential, + 1, logarithm     h = a h + b      2 N      one multiply-add
    + D x                  2        only with D                     C . h            2 N      one multiply-add

The published one is 9 B L D N, and B L D for the skip, with D the channels of all paths together and L the steps of the longest,
since the published code pads all paths to that. It is the rule of VMamba and LocalVMamba (and stems from a parallel prefix scan).
Their tables add it to the multiply-adds of matrix products and convolutions and to 5 for each value that a LayerNorm takes (4
without weights); `FlopCount.macs` is that sum. Other tables count otherwise: LocalVim's takes one direction's convolution and
projections for four and 5 N + 2 for a scan; Vim was published without a counter, and what others quote for it (1.5 G for Vim-Ti,
where `macs` is 1.8 G) takes less for its scans.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

from visionssm.errors import UserError
from visionssm.ops.paths import path_length

__all__ = ["FlopCount", "count_flops"]

_OPS = torch.ops.visionssm


@dataclass(frozen=True)
class FlopCount:
    """What one forward pass costs, in total for the batch.

    Args:
        shape: the batch of images counted, (batch, channels, height, width).
        flops: two for each multiply-add of matrix products and convolutions, as PyTorch counts, and the scans' by our count.
        scan_flops: of these, the scans', with the expansion of their low-rank steps.
        macs: comparable with published tables: multiply-adds of matrix products (those expansions among them) and convolutions, and
            the scans and LayerNorms by the published rule.
        scan_macs: of these, the scans' by the published rule.
        backward_flops: FLOPs of the backward pass to the parameters, by the count of `flops`; None if it was not asked for.
    """

    shape: tuple[int, ...]
    flops: int
    scan_flops: int
    macs: int
    scan_macs: int
    backward_flops: int | None = None

    def __str__(self) -> str:
        backward = "" if self.backward_flops is None else f", backward {self.backward_flops / 1e9:.3f} GFLOPs"
        return (
            f"{' x '.join(map(str, self.shape))}: {self.macs / 1e9:.3f} G multiply-adds by the published rule "
            f"(scans {self.scan_macs / 1e9:.3f}), {self.flops / 1e9:.3f} GFLOPs (scans {self.scan_flops / 1e9:.3f}){backward}"
        )


def count_flops(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224), backward: bool = False) -> FlopCount:
    """Count one forward pass, and on request one backward pass to the parameters.

    On the meta device (`timm.create_model(name, device="meta")`) it takes neither memory nor arithmetic; elsewhere the model really
    runs. It is left as it was.

    Args:
        model: any model of images, not of this zoo alone.
        input_size: (channels, height, width) of one image, pixels, or (batch, channels, height, width).
        backward: count the backward pass too. A grouped convolution's weight gradient is counted by group; FlopCounterMode alone
            counts a depthwise one as if it were dense.

    Returns:
        The counts.

    Raises:
        UserError: an `input_size` of neither form. A ValueError.
    """
    shape = _batch_shape(input_size)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros(shape, device=like.device, dtype=like.dtype)
    recorder = _Recorder()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False, custom_mapping=recorder.formulas) as counter:
            output = model(images)
            forward, scans, norms = counter.get_total_flops(), list(recorder.scans), recorder.norm_macs
            if backward and weights:
                torch.autograd.grad(sum(tensor.sum() for tensor in _tensors(output)), weights, allow_unused=True)
    finally:
        for module, training in modes.items():
            module.training = training
    scan_flops = sum(scan.flops for scan in scans)
    scan_macs = sum(scan.published_macs for scan in scans)
    return FlopCount(
        shape=shape,
        flops=forward,
        scan_flops=scan_flops,
        macs=(forward - scan_flops) // 2 + sum(scan.expansion_macs for scan in scans) + scan_macs + norms,
        scan_macs=scan_macs,
        backward_flops=counter.get_total_flops() - forward if backward else None,
    )


@dataclass(frozen=True)
class _Scan:
    """The shape of K scans over one batch.

    Args:
        batch: images.
        lengths: steps of each path.
        channels: C of each path.
        state: N.
        rank: R of a low-rank step, 0 for a step at full width.
        bias: whether the step has a bias.
        softplus: whether the step goes through softplus.
        skip: whether there is a D.
    """

    batch: int
    lengths: tuple[int, ...]
    channels: int
    state: int
    rank: int
    bias: bool
    softplus: bool
    skip: bool

    @property
    def _cells(self) -> int:
        return self.batch * sum(self.lengths) * self.channels

    @property
    def expansion_macs(self) -> int:
        """Multiply-adds of dt_weight dt."""
        return self._cells * self.rank

    @property
    def published_macs(self) -> int:
        """9 B L D N, and B L D with a skip."""
        cells = self.batch * max(self.lengths) * len(self.lengths) * self.channels
        return cells * (9 * self.state + self.skip)

    @property
    def _step_flops(self) -> int:
        return 2 * self.rank + self.bias + 3 * self.softplus

    @property
    def flops(self) -> int:
        """Ours; the table in the module's docstring."""
        return self._cells * (self._step_flops + 7 * self.state + 1 + 2 * self.skip)

    @property
    def backward_flops(self) -> int:
        """Ours, for the equations of the gradients in ops/README.md, one path, step and channel at a time.

        Every backend recomputes delta and delta x (as forward) and h (5 N), then

            g = C dy + a g      3 N       B . g                        2 N
            dB, dC              2 N each  p = a h g                    2 N
            dA += delta p       2 N       A . p                        2 N
            dx = delta (B . g)  1         + D dy, dD += dy x           2 each, only with D
            x (B . g) + A . p   2         softplus' slope, times it    2, a division and a product
            ddt, ddt_weight     2 R each  ddt_bias                     1
        """
        step = 2 * self._step_flops + 2 * self.rank - self.softplus
        return self._cells * (step + 20 * self.state + 4 + 4 * self.skip)


def _map_scan(
    x: Any, x_dbl: Any, A: Any, D: Any, dt_weight: Any, dt_bias: Any, paths: list[str], dt_softplus: bool, *options: Any
) -> _Scan:
    """From the shapes that `visionssm::cross_selective_scan` takes."""
    batch, _, height, width, channels = x
    lengths = tuple(path_length(name, height, width) for name in paths)
    rank = 0 if dt_weight is None else dt_weight[2]
    return _Scan(batch, lengths, channels, A[2], rank, dt_bias is not None, dt_softplus, D is not None)


def _sequence_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: bool, *options: Any
) -> _Scan:
    """From the shapes that `visionssm::selective_scan` takes; its gate z is elementwise and not counted."""
    batch, dim, length = u
    return _Scan(batch, (length,), dim, A[1], 0, delta_bias is not None, delta_softplus, D is not None)


_SCANS = {_OPS.cross_selective_scan: _map_scan, _OPS.selective_scan: _sequence_scan}


@register_flop_formula(_OPS.cross_selective_scan)
def _map_scan_flops(*args: Any, out_shape: Any = None) -> int:
    return _map_scan(*args).flops


@register_flop_formula(_OPS.selective_scan)
def _sequence_scan_flops(*args: Any, out_shape: Any = None) -> int:
    return _sequence_scan(*args).flops


@register_flop_formula(_OPS.cross_selective_scan_backward)
def _map_scan_backward_flops(dy: Any, states: Any, *args: Any, out_shape: Any = None) -> int:
    return _map_scan(*args).backward_flops


@register_flop_formula(_OPS.selective_scan_backward)
def _sequence_scan_backward_flops(dy: Any, states: Any, *args: Any, out_shape: Any = None) -> int:
    return _sequence_scan(*args).backward_flops


@register_flop_formula([_OPS.cross_scan, _OPS.cross_merge])
def _moving_flops(*args: Any, out_shape: Any = None) -> int:
    """They move values, and sum them, which is elementwise."""
    return 0


class _Recorder:
    """Formulas for FlopCounterMode that also keep what the published rule needs."""

    def __init__(self) -> None:
        self.scans: list[_Scan] = []
        self.norm_macs = 0
        self.formulas = {
            **{operator: self._scan_formula(shape_of) for operator, shape_of in _SCANS.items()},
            torch.ops.aten.native_layer_norm: self._layer_norm,
            torch.ops.aten.convolution_backward: _convolution_backward,
        }

    def _scan_formula(self, shape_of: Any) -> Any:
        def formula(*args: Any, out_shape: Any = None) -> int:
            scan = shape_of(*args)
            self.scans.append(scan)
            return scan.flops

        return formula

    def _layer_norm(self, x: Any, normalized: Any, weight: Any, *args: Any, out_shape: Any = None) -> int:
        self.norm_macs += math.prod(x) * (4 if weight is None else 5)
        return 0


def _convolution_backward(
    dy: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    out_shape: Any = None,
) -> int:
    """The gradients of input and weight each take as many multiply-adds as the convolution."""
    return conv_flop_count(x, weight, dy, transposed) * (wanted[0] + wanted[1])


def _batch_shape(input_size: tuple[int, ...]) -> tuple[int, ...]:
    forms = "(channels, height, width) or (batch, channels, height, width), positive integers"
    if not isinstance(input_size, (tuple, list)) or len(input_size) not in (3, 4):
        raise UserError(f"input_size: expected {forms}, got {input_size!r}")
    if not all(isinstance(side, int) and side > 0 for side in input_size):
        raise UserError(f"input_size: expected {forms}, got {input_size!r}")
    return tuple(input_size) if len(input_size) == 4 else (1, *input_size)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, whether one, a list of features or nested."""
    return (leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor))
