"""The bidirectional mixer of Vim: one Mamba branch along the sequence, one against it.

Source: Vim (arXiv 2401.09417, algorithm 1).
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionssm.layers.ssm_init import A_from_log, init_A_log_, init_dt_bias_, init_dt_weight_, init_linear_
from visionssm.ops import BIDIRECTIONAL, cross_selective_scan_packed


class VimMixer(nn.Module):
    """in_proj; per direction a causal depthwise convolution, SiLU and a scan; gate, out_proj: `(batch, L, dim)` to the same shape.

    Everything stays in the order of the sequence: the second direction's convolution is anti-causal and its scan walks backwards,
    so nothing is flipped. Parameters are stacked over the two directions, forward first. The directions share the gate silu(z),
    which is therefore applied to the sum of the two scans.

    Args:
        dim: channels of the tokens.
        d_state: N, states per channel.
        expand: inner width over `dim`.
        d_conv: taps of the depthwise convolutions.
    """

    def __init__(
        self, dim: int, d_state: int = 16, expand: int = 2, d_conv: int = 4, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        inner, k, rank = expand * dim, len(BIDIRECTIONAL), math.ceil(dim / 16)
        self.paths = BIDIRECTIONAL
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d_weight = nn.Parameter(torch.empty(k, inner, d_conv, **dd))  # last tap: the token itself
        self.conv1d_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(k, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Initialise all parameters but those of the two linears."""
        init_linear_(self.conv1d_weight)  # a depthwise channel has d_conv inputs
        bound = self.conv1d_weight.shape[-1] ** -0.5
        self.conv1d_bias.uniform_(-bound, bound)
        init_linear_(self.x_proj_weight)
        init_dt_weight_(self.dt_projs_weight)
        init_dt_bias_(self.dt_projs_bias[0])
        # The published models were trained from this: a step near 0.69 backwards, against 0.001 to 0.1 forwards.
        self.dt_projs_bias[1].zero_()
        init_A_log_(self.A_logs)
        self.Ds.fill_(1.0)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of in_proj, each `(batch, L, inner)`: what is convolved and scanned, and the gate."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return u, z

    def convolve(self, u: Tensor) -> Tensor:
        """The two convolutions before their SiLU: `(batch, L, inner)` -> `(batch, 2, 1, L, inner)`."""
        k, inner, taps = self.conv1d_weight.shape
        # One channels-last convolution for both directions: 2 d_conv - 1 taps centred on the token, the first d_conv of them for
        # the forward branch, the last d_conv, mirrored, for the backward one. Doubling u is cheaper than changing its layout.
        causal = F.pad(self.conv1d_weight[0], (0, taps - 1))
        anti_causal = F.pad(self.conv1d_weight[1].flip(-1), (taps - 1, 0))
        weight = torch.cat([causal, anti_causal]).unsqueeze(1).unsqueeze(1)  # [2E, 1, 1, taps]
        u = torch.cat([u, u], dim=-1).unsqueeze(1).permute(0, 3, 1, 2)  # [B, 2E, 1, L]
        u = F.conv2d(u, weight, self.conv1d_bias.flatten(), padding=(0, taps - 1), groups=k * inner)
        return u.permute(0, 2, 3, 1).unflatten(-1, (k, inner)).permute(0, 3, 1, 2, 4)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan and the gate are made of.

        Args:
            x: tokens `(batch, L, dim)`.

        Returns:
            The two convolved sequences `(batch, 2, 1, L, inner)`, their packed projections dt | B | C `(batch, 1, L, 2, R + 2N)`,
            and z, the gate before SiLU, `(batch, L, inner)`.
        """
        batch, length, _ = x.shape
        u, z = self.branches(x)
        v = F.silu(self.convolve(u))
        rows = v.permute(0, 2, 3, 1, 4).flatten(0, 2)  # [B * L, 2, inner], as it lies in memory
        x_dbl = torch.bmm(rows.transpose(0, 1), self.x_proj_weight.mT)  # [2, B * L, R + 2N]
        return v, x_dbl.transpose(0, 1).unflatten(0, (batch, 1, length)), z

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
        )
        return self.out_proj(F.silu(z) * y.squeeze(1)) * 0.5  # the mean of the two directions
