"""A mixer's scans as a linear map: what a scan reads, with dt, B and C fixed, and the factors before and after it.

Notation of "The Hidden Attention of Mamba Models" (arXiv 2403.01590, section 3): along one path, in one channel, the scan is
y = alpha v with alpha[i, j] = C_i (prod_{k=j+1..i} exp(dt_k A)) dt_j B_j for j <= i. Nothing here is of size L x L: alpha is only
ever applied, by the library's operator.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionssm.layers.ss2d import SS2D
from visionssm.layers.ssm_init import A_from_log
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models.local_vim import LocalVimMixer, scan_paths
from visionssm.ops import ScanPaths, cross_merge, cross_scan, cross_selective_scan_packed

_SMALLEST_STEP = 1e-30  # it decays nothing, and what is divided by it is still a float32


@dataclass(frozen=True)
class ScanOperands:
    """The K scans of one mixer on one batch, without what they scan; P positions, E channels, N states.

    They lie on an H x W map: that of the image, or in the order of the paths a row of L' steps for each path.

    Args:
        x_dbl: dt | B | C packed: `(batch, H, W, K, R + 2N)`. float32 or float64.
        A: `(K, E, N)`.
        D: `(K, E)`.
        paths: the K paths over the image.
        dt_weight: `(K, E, R)`, or None where dt comes at full width, R = E.
        dt_bias: `(K, E)` or None.
        dt_softplus: whether softplus is still to be applied to dt.
        in_path_order: the map is 1 x L', in the order of the paths. There padded steps hold values of their own.
    """

    x_dbl: Tensor
    A: Tensor
    D: Tensor
    paths: ScanPaths
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool = True
    in_path_order: bool = False

    @property
    def walks(self) -> ScanPaths:
        """The K paths over the map of `x_dbl`."""
        return ScanPaths(("h",) * len(self.paths), (1, self.paths.length)) if self.in_path_order else self.paths

    def some(self, which: slice) -> ScanOperands:
        """Some of the paths."""
        paths = replace(self.paths, names=self.paths.names[which])
        if len(paths) == len(self.paths):
            return self
        return replace(
            self,
            x_dbl=self.x_dbl[:, :, : paths.length if self.in_path_order else None, which],
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
        """Positions `(batch, P, E)`, shared by all paths, on the map: `(batch, K or 1, H, W, E)`."""
        return cross_scan(v, self.paths).unsqueeze(2) if self.in_path_order else v.unflatten(1, self.paths.size).unsqueeze(1)

    def put_back(self, v: Tensor) -> Tensor:
        """The adjoint of `read`, the paths summed: `(batch, K or 1, H, W, .)` -> positions `(batch, P, .)`."""
        return (cross_merge(v.squeeze(2), self.paths) if self.in_path_order else v.sum(1)).flatten(1, -2)

    def scan(self, v: Tensor, skip: bool, merge: bool) -> Tensor:
        """Alpha v, or (alpha + D) v.

        Args:
            v: `(batch, K or 1, H, W, E)`.
            skip: add D v.
            merge: sum the paths.

        Returns:
            Positions in raster order, `(batch, P, E)` or `(batch, K, P, E)`.
        """
        y = cross_selective_scan_packed(
            v.squeeze(1),  # one map for all paths has no axis for them
            self.x_dbl,
            self.A,
            self.D if skip else None,
            paths=self.walks,
            dt_weight=self.dt_weight,
            dt_bias=self.dt_bias,
            dt_softplus=self.dt_softplus,
            merge=merge and not self.in_path_order,
        )
        if self.in_path_order:
            y = cross_merge(y.squeeze(2), self.paths, merge=merge)
        return y.flatten(1 if merge else 2, -2)

    def scan_transposed(self, cotangent: Tensor, skip: bool) -> Tensor:
        """alpha^T r, or (alpha + D)^T r, of every path.

        alpha[i, j] = dt_j B_j g_j with g_i = C_i r_i and g_j = C_j r_j + exp(dt_{j+1} A) g_{j+1}: again a scan, along the path in
        reverse, of r with B and C exchanged, whose steps are those of the position just passed. The operator multiplies its
        input by the step as well, hence the division.

        Args:
            cotangent: r, `(batch * count, P, E)`, `count` vectors for every sample.
            skip: add D r.

        Returns:
            `(batch * count, K, H, W, E)`.
        """
        dt, B, C = self._split()
        delta = self._steps(dt)
        x_dbl = torch.cat([self._steps_ahead(delta).clamp_min_(_SMALLEST_STEP), C, B], dim=-1)
        count = cotangent.shape[0] // delta.shape[0]
        if count > 1:
            x_dbl, delta = x_dbl.repeat_interleave(count, 0), delta.repeat_interleave(count, 0)
        walks = self.walks.names
        reverse = tuple(name.removesuffix("_flip") if name.endswith("_flip") else f"{name}_flip" for name in walks)
        r, ahead = self.read(cotangent), x_dbl[..., : delta.shape[-1]].movedim(3, 1)
        y = cross_selective_scan_packed(r / ahead, x_dbl, self.A, paths=reverse, dt_softplus=False, merge=False)
        y = delta.movedim(3, 1) * y
        return y.addcmul_(self.D[:, None, None], r) if skip else y

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.A.shape[-1]
        return self.x_dbl.split([self.x_dbl.shape[-1] - 2 * n, n, n], dim=-1)

    def _steps(self, dt: Tensor) -> Tensor:
        """The steps of every channel `(batch, H, W, K, E)`, from dt as it is packed."""
        if self.dt_weight is not None:
            dt = torch.einsum("bhwkr,ker->bhwke", dt, self.dt_weight)
        if self.dt_bias is not None:
            dt = dt + self.dt_bias
        return F.softplus(dt) if self.dt_softplus else dt

    def _steps_ahead(self, delta: Tensor) -> Tensor:
        """The step that every path takes from every position to its next, padded steps between them included; any at its end."""
        following, padded = _following(self.walks, delta.device)
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
    """What the mixer does around its scans, linear for the recorded input; on the map of the scans.

    Args:
        right: `(batch, K or 1, H, W, E)`: `sigmoid(c)`, SiLU as a factor of the convolution's output c, times the weight of the
            direction, one for each channel, which might as well stand on the left of the scan.
        left: the factor of the sum of the scans, `(batch, P, E)`: gate, scale of a norm.
        taps: of the depthwise convolutions, centred, `(K or 1, E, h, w)` with h and w odd.
    """

    right: Tensor
    left: Tensor
    taps: Tensor

    def some(self, which: slice, operands: ScanOperands) -> MixerFactors:
        """Some of the paths, whose operands are given."""
        right = self.right if self.right.shape[1] == 1 else self.right[:, which, :, : operands.x_dbl.shape[2]]
        taps = self.taps if len(self.taps) == 1 else self.taps[which]
        return MixerFactors(right, self.left, taps)

    def before(self, v: Tensor) -> Tensor:
        """diag(right) T v: what is scanned, `(batch, K or 1, H, W, E)` to the same."""
        return self.right * _depthwise(v.expand(-1, len(self.taps), -1, -1, -1), self.taps)

    def before_transposed(self, v: Tensor) -> Tensor:
        """T^T diag(right) v, of `(batch * count, K, H, W, E)`, which it overwrites; where the paths share T, of their sum."""
        count = v.shape[0] // self.right.shape[0]
        v *= self.right if count == 1 else self.right.repeat_interleave(count, 0)
        if len(self.taps) == 1:
            v = v.sum(1, keepdim=True)
        return _depthwise(v, self.taps.flip(2, 3))


def _depthwise(v: Tensor, taps: Tensor) -> Tensor:
    """`(batch, K, H, W, E)` to the same, by the centred `taps` `(K, E, h, w)`; zeros lie around the map."""
    maps = v.movedim(-1, 2).flatten(1, 2)
    maps = F.conv2d(maps, taps.flatten(0, 1).unsqueeze(1), padding="same", groups=maps.shape[1])
    return maps.unflatten(1, taps.shape[:2]).movedim(2, -1)


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
    x_dbl = mixer.scan_inputs(x, paths)[1].transpose(1, 2).unsqueeze(1)  # [B, 1, L', K, R + 2N]
    return _operands(mixer, x_dbl, paths, in_path_order=True)


def _operands(mixer: nn.Module, x_dbl: Tensor, paths: ScanPaths, in_path_order: bool = False) -> ScanOperands:
    """Copies of the weights, which may change while an attention is in use."""
    A = A_from_log(mixer.A_logs)
    dtype = torch.promote_types(x_dbl.dtype, A.dtype)  # at least float32
    D, weight, bias = (m.to(dtype, copy=True) for m in (mixer.Ds, mixer.dt_projs_weight, mixer.dt_projs_bias))
    return ScanOperands(x_dbl.to(dtype), A.to(dtype), D, paths, weight, bias, in_path_order=in_path_order)


@functools.singledispatch
def mixer_factors(mixer: nn.Module, operands: ScanOperands, *inputs: object) -> MixerFactors:
    """The factors around the scans of `mixer`, given what `scan_operands` made of the same `inputs`."""
    raise TypeError(f"mixer: {type(mixer).__name__} has no known scan")


@mixer_factors.register
def _(mixer: VimMixer, operands: ScanOperands, x: Tensor) -> MixerFactors:
    u, z = mixer.branches(x)
    forward, backward = _causal(mixer.conv1d_weight)
    taps = torch.stack([forward, backward.flip(-1)])
    return _factors(operands, mixer.convolve(u).sigmoid(), 0.5 * F.silu(z), taps)


@mixer_factors.register
def _(mixer: SS2D, operands: ScanOperands, x: Tensor) -> MixerFactors:
    u, z = mixer.branches(x)
    c = mixer.convolve(u).unsqueeze(1)
    y = operands.scan(F.silu(c).to(operands.A.dtype), skip=True, merge=mixer.scan_attn is None)
    right = c.sigmoid()
    if mixer.scan_attn is not None:
        weights = _weights(mixer.scan_attn, y)
        y, right = (y * weights).sum(1), right * weights.unsqueeze(2)
    left = mixer.out_norm.weight * (y.var(-1, unbiased=False, keepdim=True) + mixer.out_norm.eps).rsqrt()
    if z is not None:
        left = left * F.silu(z.flatten(1, 2))
    return _factors(operands, right, left, mixer.conv2d.weight.transpose(0, 1).clone())


@mixer_factors.register
def _(mixer: LocalVimMixer, operands: ScanOperands, x: Tensor, size: tuple[int, int]) -> MixerFactors:
    u, z = mixer.branches(x)
    c = mixer.convolve(u, operands.paths).unsqueeze(2)
    gate = F.silu(z)
    y = operands.scan(F.silu(c).to(operands.A.dtype), skip=True, merge=False)
    weights = _weights(mixer.attn, y * gate.unsqueeze(1))
    return _factors(operands, c.sigmoid() * weights.unsqueeze(2), gate, _causal(mixer.conv1d_weight))


def _weights(attn: nn.Module, y: Tensor) -> Tensor:
    """BiAttn's weights of scans that are wider than the parameters may be."""
    return attn.weights(y.to(attn.global_reduce.weight.dtype)).to(y.dtype)


def _causal(weight: Tensor) -> Tensor:
    """Centred taps `(K, E, 1, 2 taps - 1)` of the causal convolutions `(K, E, taps)`, whose last tap is the current step's."""
    return F.pad(weight, (0, weight.shape[-1] - 1)).unsqueeze(2)


def _factors(operands: ScanOperands, right: Tensor, left: Tensor, taps: Tensor) -> MixerFactors:
    return MixerFactors(*(m.to(operands.A.dtype) for m in (right, left, taps)))
