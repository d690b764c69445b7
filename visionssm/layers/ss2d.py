"""SS2D, the mixer of the hierarchical families: a selective scan of one map along several 2-D paths.

Sources: VMamba (arXiv 2401.10166, section 4.2), LocalMamba (arXiv 2403.09338, section 3.2).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionssm.layers.ssm_init import A_from_log, init_A_log_, init_dt_bias_, init_dt_weight_, init_linear_
from visionssm.ops import CROSS, cross_selective_scan_packed
from visionssm.ops.paths import check_names


class SS2D(nn.Module):
    """in_proj, depthwise 3x3 convolution, SiLU, scan along K paths, LayerNorm, out_proj; `(batch, H, W, dim)` to the same shape.

    Args:
        dim: channels of the map.
        d_state: N, states per channel.
        ssm_ratio: inner width over `dim`.
        paths: K path names, see `visionssm.ops`.
        gate: multiply the normed scan by SiLU of a second branch of in_proj.
        conv_bias: give the depthwise convolution a bias.
        scan_attn: a layer class called with the inner width; its module takes the unmerged scan `(batch, K, H, W, inner)` to the
            merged `(batch, H, W, inner)`. None sums the paths inside the operator.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        paths: Sequence[str] = CROSS,
        gate: bool = False,
        conv_bias: bool = False,
        scan_attn: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        inner, k, rank = int(ssm_ratio * dim), len(paths), math.ceil(dim / 16)
        self.paths = check_names(paths)
        self.d_state, self.dt_rank, self.gate = d_state, rank, gate

        self.in_proj = nn.Linear(dim, inner * 2 if gate else inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias, **dd)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(k, inner, **dd))
        self.scan_attn = None if scan_attn is None else scan_attn(inner, **dd)
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Initialise the scan's own parameters (Mamba's rules); the linears follow the model's."""
        init_linear_(self.x_proj_weight)
        init_dt_weight_(self.dt_projs_weight)
        init_dt_bias_(self.dt_projs_bias)
        init_A_log_(self.A_logs)
        self.Ds.fill_(1.0)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two halves of in_proj, each `(batch, H, W, inner)`: what is convolved and scanned, and the gate or None."""
        x = self.in_proj(x)
        if not self.gate:
            return x, None
        u, z = x.chunk(2, dim=-1)
        return u, z

    def convolve(self, u: Tensor) -> Tensor:
        """The depthwise convolution before its SiLU, `(batch, H, W, inner)` to the same shape."""
        return self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the scan and the gate are made of.

        Args:
            x: a map `(batch, H, W, dim)`.

        Returns:
            The convolved map `(batch, H, W, inner)`, its packed projections dt | B | C `(batch, H, W, K, R + 2N)`, and the gate
            before SiLU `(batch, H, W, inner)` or None.
        """
        u, z = self.branches(x)
        v = self.act(self.convolve(u))
        x_dbl = F.linear(v, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (len(self.paths), -1))  # [B, H, W, K, R + 2N]
        return v, x_dbl, z

    def forward(self, x: Tensor) -> Tensor:
        v, x_dbl, z = self.scan_inputs(x)
        y = cross_selective_scan_packed(
            v,
            x_dbl,
            A_from_log(self.A_logs),
            self.Ds,
            paths=self.paths,
            dt_weight=self.dt_projs_weight,
            dt_bias=self.dt_projs_bias,
            merge=self.scan_attn is None,
        )
        if self.scan_attn is not None:
            y = self.scan_attn(y)
        y = self.out_norm(y)
        if z is not None:
            y = y * F.silu(z)
        return self.out_proj(y)
