"""A mixer's scans as a linear map: what a scan reads, with dt, B and C fixed, and the factors before and after it.

Notation of "The Hidden Attention of Mamba Models" (arXiv 2403.01590, section 3): along one path, in one channel, the scan is
y = alpha v with alpha[i, j] = C_i (prod_{k=j+1..i} exp(dt_k A)) dt_j B_j for j <= i. Nothing here is of size L x L: alpha is only
ever applied, by the library's operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionssm.layers.ss2d import SS2D
from visionssm.layers.ssm_init import A_from_log
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models.local_vim import LocalVimMixer, scan_paths
from visionssm.ops import ScanPaths, cross_merge, cross_scan, cross_selective_scan, cross_selective_scan_packed

_SMALLEST_STEP = 1e-30  # it decays nothing, and what is divided by it is still a float32


@dataclass(frozen=True)
class ScanOperands:
    """The K scans of one mixer on one batch, without what they scan; P positions, E channels, N states.

    Args:
        x_dbl: dt | B | C packed: `(batch, H, W, K, R + 2N)`, or `(batch, K, L', R + 2N)` in the order of the paths. float32 or
            float64.
        A: `(K, E, N)`.
        D: `(K, E)`.
        paths: the K paths.
        dt_weight: `(K, E, R)`, or None where dt comes at full width, R = E.
        dt_bias: `(K, E)` or None.
        dt_softplus: whether softplus is still to be applied to dt.
        in_path_order: the layout of `x_dbl`. In the order of the paths padded steps hold values of their own.
    """

    x_dbl: Tensor
    A: Tensor
    D: Tensor
    paths: ScanPaths
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool = True
    in_path_order: bool = False

    def direction(self, k: int) -> ScanOperands:
        """Path `k` alone."""
        return self.some(slice(k, k + 1))

    def some(self, which: slice) -> ScanOperands:
        """Some of the paths."""
        paths = replace(self.paths, names=self.paths.names[which])
        return replace(
            self,
            x_dbl=self.x_dbl[:, which, : paths.length] if self.in_path_order else self.x_dbl[:, :, :, which],
            A=self.A[which],
            D=self.D[which],
            paths=paths,
            dt_weight=None if self.dt_weight is None else self.dt_weight[which],
            dt_bias=None if self.dt_bias is None else self.dt_bias[which],
        )

    def absolute(self) -> ScanOperands:
        """|B|, |C| and |D|: no element of this alpha is smaller than the magnitude of the same element of the true one."""
        dt, B, C = self._split()
        return replace(self, x_dbl=torch.cat([dt, B.abs(), C.abs()], dim=-1), D=self.D.abs())

    def without_decay_at(self, position: int) -> ScanOperands:
        """The step of one position 0: it neither decays what came before it nor is written; image order only."""
        dt, B, C = self._split()
        delta = self._steps(dt).clone()
        delta[:, position // self.paths.size[1], position % self.paths.size[1]] = 0.0
        return replace(self, x_dbl=torch.cat([delta, B, C], dim=-1), dt_weight=None, dt_bias=None, dt_softplus=False)

    def read(self, v: Tensor) -> Tensor:
        """Positions `(batch, P, E)`, shared by all paths, in the layout that `scan` takes."""
        return cross_scan(v, self.paths) if self.in_path_order else v.unflatten(1, self.paths.size)

    def scan(self, v: Tensor, skip: bool, merge: bool) -> Tensor:
        """Alpha v, or (alpha + D) v.

        Args:
            v: from `read`, or one sequence per path: `(batch, K, H, W, E)`, `(batch, K, L', E)` in the order of the paths.
            skip: add D v.
            merge: sum the paths.

        Returns:
            Positions in raster order, `(batch, P, E)` or `(batch, K, P, E)`.
        """
        D = self.D if skip else None
        options = {"dt_weight": self.dt_weight, "dt_bias": self.dt_bias, "dt_softplus": self.dt_softplus}
        if self.in_path_order:
            dt, B, C = self._split()
            y = cross_selective_scan(v, dt, self.A, B, C, D, paths=self.paths, order="scan", **options)
            y = cross_merge(y, self.paths, merge=merge)
            return y if self.paths.token_at is not None else y.flatten(-3, -2)
        y = cross_selective_scan_packed(v, self.x_dbl, self.A, D, paths=self.paths, merge=merge, **options)
        return y.flatten(-3, -2)

    def scan_transposed(self, cotangent: Tensor, skip: bool) -> Tensor:
        """alpha^T r, or (alpha + D)^T r, of every path.

        alpha[i, j] = dt_j B_j g_j with g_i = C_i r_i and g_j = C_j r_j + exp(dt_{j+1} A) g_{j+1}: again a scan, along the path in
        reverse, of r with B and C exchanged, whose steps are those of the position just passed. The operator multiplies its
        input by the step as well, hence the division.

        Args:
            cotangent: r, `(batch * count, P, E)`, `count` vectors for every sample.
            skip: add D r.

        Returns:
            In the layout that `scan` takes per path: `(batch * count, K, H, W, E)`, or `(batch * count, K, L', E)`.
        """
        dt, B, C = self._split()
        delta = self._steps(dt)
        x_dbl = torch.cat([self._steps_ahead(delta).clamp_min_(_SMALLEST_STEP), C, B], dim=-1)
        count = cotangent.shape[0] // delta.shape[0]
        if count > 1:
            x_dbl, delta = x_dbl.repeat_interleave(count, 0), delta.repeat_interleave(count, 0)
        reverse = tuple(name.removesuffix("_flip") if name.endswith("_flip") else f"{name}_flip" for name in self.paths.names)
        n, r = self.A.shape[-1], self.read(cotangent)
        ahead = x_dbl[..., : delta.shape[-1]]
        if self.in_path_order:
            operands = (m.flip(2) for m in (r / ahead, *x_dbl.split([ahead.shape[-1], n, n], dim=-1)))
            u, step, B, C = operands
            y = cross_selective_scan(u, step, self.A, B, C, paths=reverse, dt_softplus=False, order="scan").flip(2)
        else:
            ahead, delta, r = ahead.movedim(3, 1), delta.movedim(3, 1), r.unsqueeze(1)
            y = cross_selective_scan_packed(r / ahead, x_dbl, self.A, paths=reverse, dt_softplus=False, merge=False)
        y = delta * y
        return y + self.D.view(len(reverse), *(1,) * (y.dim() - 3), -1) * r if skip else y

    def put_back(self, v: Tensor) -> Tensor:
        """The adjoint of `read`: what `scan_transposed` returns, of any channels -> positions `(batch, P, .)`, the paths summed."""
        return cross_merge(v, self.paths).flatten(1, -2) if self.in_path_order else v.sum(1).flatten(1, 2)

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.A.shape[-1]
        return self.x_dbl.split([self.x_dbl.shape[-1] - 2 * n, n, n], dim=-1)

    def _steps(self, dt: Tensor) -> Tensor:
        """The steps of every channel `(..., E)`, from dt as it is packed and in its layout."""
        if self.dt_weight is not None:
            dt = torch.einsum("bklr,ker->bkle" if self.in_path_order else "bhwkr,ker->bhwke", dt, self.dt_weight)
        if self.dt_bias is not None:
            dt = dt + (self.dt_bias.unsqueeze(1) if self.in_path_order else self.dt_bias)
        return F.softplus(dt) if self.dt_softplus else dt

    def _steps_ahead(self, delta: Tensor) -> Tensor:
        """The step that every path takes from every position to its next, padded steps between them included; any at its end."""
        if self.in_path_order:
            return delta.roll(-1, 2)
        following, padded = _following(self.paths, delta.device)
        ahead = delta.flatten(1, 3).index_select(1, following).view(delta.shape)
        if padded is None:
            return ahead
        rank = self.x_dbl.shape[-1] - 2 * self.A.shape[-1]
        return ahead + padded * self._steps(self.x_dbl.new_zeros(1, 1, 1, len(self.paths), rank))


@functools.lru_cache(maxsize=64)
def _following(paths: ScanPaths, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where every path goes from every position.

    Returns:
        The index of the next position among `(H * W * K)`, position 0 at the end of a path; and the number of padded steps
        between them, `(H, W, K, 1)`, None where no path has any.
    """
    count = len(paths)
    following, padded = np.tile(np.arange(count), (paths.positions, 1)), np.zeros((paths.positions, count), dtype=np.float32)
    for k, table in enumerate(paths.table):
        at = np.flatnonzero(table >= 0)
        following[table[at[:-1]], k] = table[at[1:]] * count + k
        padded[table[at[:-1]], k] = np.diff(at) - 1
    between = torch.from_numpy(padded).to(device).view(*paths.size, count, 1) if padded.any() else None
    return torch.from_numpy(following.reshape(-1)).to(device), between


@dataclass(frozen=True)
class MixerFactors:
    """What the mixer does around its scans, linear for the recorded input.

    Args:
        right: `sigmoid(c)` in the layout of the scan, c the output of the convolution: SiLU as a factor.
        left: the factor of the scans' outputs, `(batch, K or 1, P, E)`: gate, weights of the directions, scale of a norm.
        convolutions: positions `(batch, P, E)` -> c without its bias, in the layout of the scan; one for each path or one for all.
    """

    right: Tensor
    left: Tensor
    convolutions: tuple[Callable[[Tensor], Tensor], ...]

    @property
    def shared(self) -> bool:
        """Whether they are the same around all paths."""
        return len(self.convolutions) == 1 and self.left.shape[1] == 1

    def direction(self, k: int, operands: ScanOperands) -> MixerFactors:
        """Path `k` alone, whose operands are given."""
        one = slice(k, k + 1)
        left = self.left if self.left.shape[1] == 1 else self.left[:, one]
        if len(self.convolutions) == 1:
            return replace(self, left=left)
        right = self.right[:, one, : operands.paths.length] if operands.in_path_order else self.right[:, one]
        return MixerFactors(right, left, self.convolutions[one])

    def repeat(self, count: int) -> MixerFactors:
        """Every sample `count` times."""
        if count == 1:
            return self
        return replace(self, right=self.right.repeat_interleave(count, 0), left=self.left.repeat_interleave(count, 0))


@functools.singledispatch
def scan_operands(mixer: nn.Module, *inputs: object) -> ScanOperands:
    """What the scans of `mixer` read when its forward is given `inputs`. A mixer class joins by registering here."""
    raise TypeError(f"mixer: {type(mixer).__name__} has no known scan")


@scan_operands.register
def _(mixer: VimMixer, x: Tensor) -> ScanOperands:
    x_dbl = mixer.scan_inputs(x)[1]
    return _operands(mixer, x_dbl, ScanPaths(mixer.paths, (1, x.shape[1])))


@scan_operands.register
def _(mixer: SS2D, x: Tensor) -> ScanOperands:
    return _operands(mixer, mixer.scan_inputs(x)[1], ScanPaths(mixer.paths, tuple(x.shape[1:3])))


@scan_operands.register
def _(mixer: LocalVimMixer, x: Tensor, size: tuple[int, int]) -> ScanOperands:
    paths = scan_paths(mixer.paths, size, mixer.class_token)
    return _operands(mixer, mixer.scan_inputs(x, paths)[1], paths, in_path_order=True)


def _operands(mixer: nn.Module, x_dbl: Tensor, paths: ScanPaths, in_path_order: bool = False) -> ScanOperands:
    A, D, weight, bias = A_from_log(mixer.A_logs), mixer.Ds, mixer.dt_projs_weight, mixer.dt_projs_bias
    dtype = torch.promote_types(x_dbl.dtype, A.dtype)  # at least float32
    x_dbl, A, D, weight, bias = (m.detach().to(dtype) for m in (x_dbl, A, D, weight, bias))
    return ScanOperands(x_dbl, A, D, paths, weight, bias, in_path_order=in_path_order)


@functools.singledispatch
def mixer_factors(mixer: nn.Module, operands: ScanOperands, *inputs: object) -> MixerFactors:
    """The factors around the scans of `mixer`, given what `scan_operands` made of the same `inputs`."""
    raise TypeError(f"mixer: {type(mixer).__name__} has no known scan")


@mixer_factors.register
def _(mixer: VimMixer, operands: ScanOperands, x: Tensor) -> MixerFactors:
    u, z = mixer.branches(x)
    forward, backward = mixer.conv1d_weight.detach().to(operands.A.dtype)
    convolutions = (
        lambda v: _causal_convolution(v, forward)[:, None, None],
        lambda v: _causal_convolution(v.flip(1), backward).flip(1)[:, None, None],
    )
    return _factors(operands, mixer.convolve(u), 0.5 * F.silu(z).unsqueeze(1), convolutions)


@mixer_factors.register
def _(mixer: SS2D, operands: ScanOperands, x: Tensor) -> MixerFactors:
    u, z = mixer.branches(x)
    c = mixer.convolve(u)
    y = operands.scan(F.silu(c).to(operands.A.dtype), skip=True, merge=mixer.scan_attn is None)
    if mixer.scan_attn is None:
        left = y.new_ones(())
    else:
        left = _weights(mixer.scan_attn, y)
        y = (y * left).sum(1)
    scale = mixer.out_norm.weight * (y.var(-1, unbiased=False, keepdim=True) + mixer.out_norm.eps).rsqrt()
    if z is not None:
        scale = scale * F.silu(z.flatten(1, 2))
    weight = mixer.conv2d.weight.detach().to(operands.A.dtype)

    def convolve(v: Tensor) -> Tensor:
        v = v.unflatten(1, operands.paths.size).permute(0, 3, 1, 2)
        return F.conv2d(v, weight, padding="same", groups=len(weight)).permute(0, 2, 3, 1)

    return _factors(operands, c, left * scale.unsqueeze(1), (convolve,))


@mixer_factors.register
def _(mixer: LocalVimMixer, operands: ScanOperands, x: Tensor, size: tuple[int, int]) -> MixerFactors:
    u, z = mixer.branches(x)
    c = mixer.convolve(u, operands.paths)
    gate = F.silu(z).unsqueeze(1)
    y = operands.scan(F.silu(c).to(operands.A.dtype), skip=True, merge=False)
    convolutions = tuple(
        functools.partial(_convolution_along, operands.direction(k).paths, weight)
        for k, weight in enumerate(mixer.conv1d_weight.detach().to(operands.A.dtype))
    )
    return _factors(operands, c, gate * _weights(mixer.attn, y * gate), convolutions)


def _weights(attn: nn.Module, y: Tensor) -> Tensor:
    """BiAttn's weights of scans that are wider than the parameters may be."""
    return attn.weights(y.to(attn.global_reduce.weight.dtype)).to(y.dtype)


def _factors(operands: ScanOperands, c: Tensor, left: Tensor, convolutions: tuple[Callable[[Tensor], Tensor], ...]) -> MixerFactors:
    return MixerFactors(c.sigmoid().to(operands.A.dtype), left.to(operands.A.dtype), convolutions)


def _convolution_along(path: ScanPaths, weight: Tensor, v: Tensor) -> Tensor:
    """`_causal_convolution` along one path of positions `(batch, P, E)` -> `(batch, 1, L', E)`."""
    return _causal_convolution(cross_scan(v, path).squeeze(1), weight).unsqueeze(1)


def _causal_convolution(v: Tensor, weight: Tensor) -> Tensor:
    """Of sequences `(batch, L, E)`, depthwise, without bias; `weight` `(E, taps)` multiplies the current step by its last tap."""
    return F.conv1d(F.pad(v.mT, (weight.shape[-1] - 1, 0)), weight.unsqueeze(1), groups=len(weight)).mT
