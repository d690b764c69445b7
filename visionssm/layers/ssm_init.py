"""A selective state-space layer's parameters: initial values, in place, for any stacking of leading axes, and A from its logarithm.

Source: Mamba (arXiv 2312.00752, section 3.6 and appendix E.2), S4D-Real for `A`.
"""

import math

import torch
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def A_from_log(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), at least in float32: a decay rate rounded to 16 bits would be compounded over the whole sequence."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


@torch.no_grad()
def init_A_log_(A_log: Tensor) -> Tensor:
    """A = -(1..N) in every channel, stored as its logarithm: `A_log` is `(..., N)`."""
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_dt_weight_(dt_weight: Tensor) -> Tensor:
    """Uniform within +-R^-0.5 for `dt_weight` `(..., R)`, which keeps the variance of the low-rank step."""
    bound = dt_weight.shape[-1] ** -0.5
    return dt_weight.uniform_(-bound, bound)


@torch.no_grad()
def init_dt_bias_(dt_bias: Tensor, dt_min: float = 1e-3, dt_max: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """softplus(`dt_bias`) is log-uniform in [dt_min, dt_max] (steps, dimensionless), at least `floor`."""
    log_step = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    step = log_step.exp().clamp_(min=floor)
    return dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus


@torch.no_grad()
def init_linear_(weight: Tensor) -> Tensor:
    """PyTorch's default for a linear weight `(..., out, in)` that is kept as a bare, stacked parameter: uniform +-in^-0.5."""
    bound = weight.shape[-1] ** -0.5
    return weight.uniform_(-bound, bound)
