"""LocalVim: a plain backbone whose layers scan the patch grid along four searched paths each, windows among them.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", https://arxiv.org/abs/2403.09338.

Tokens are (batch, L, C) in raster order; with a class token (batch, L + 1, C), the token at index L // 2. The layers form a
pre-norm residual network. Without a class token the stream is rotated (rotary positions) before every layer.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchEmbed,
    apply_rot_embed,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor

from visionssm.layers.local_mixer import BiAttn, check_layer_paths
from visionssm.layers.patch_embed import check_image
from visionssm.layers.pos_embed import insert_token, resample_tokens, take_token
from visionssm.layers.ssm_init import A_from_log, init_A_log_
from visionssm.models._checkpoint import build_model, unwrap
from visionssm.ops import ScanPaths, cross_merge, cross_scan, cross_selective_scan
from visionssm.weights.table import published_cfgs

__all__ = ["LocalVim"]

# Paper, figure 4: the directions found by the search. Their order binds the weights.
SEARCHED_PATHS = (
    ("h", "v_flip", "w7", "w7_flip"),
    ("h_flip", "w2_flip", "w7", "w7_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w2"),
    ("h", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "w2", "w2_flip"),
    ("v", "v_flip", "w2", "w7"),
    ("h", "h_flip", "v", "w2"),
    ("h", "h_flip", "w2_flip", "w7"),
    ("v", "v_flip", "w2", "w2_flip"),
)


@register_notrace_function
def scan_paths(names: tuple[str, ...], size: tuple[int, int], class_token: bool) -> ScanPaths:
    """The paths over an (H, W) grid; a class token is step H * W // 2 of each, also of flipped ones."""
    height, width = size
    return ScanPaths(names, (height, width), token_at=height * width // 2 if class_token else None)


class RotaryTables(nn.Module):
    """Axial rotary tables: the first half of the channels turns with the row, the second half with the column.

    Called with a grid's (H, W) it returns cos and sin, each `(1, H * W, dim)`. Only the tables of a `side` x `side` grid are
    computed, its rows scaled to 0..14; those of other grids are interpolated from them, as the published models do.

    Args:
        dim: channels, a multiple of 4.
        side: rows and columns of the grid.
    """

    def __init__(self, dim: int, side: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim: rotary positions need a multiple of 4, got {dim}")
        self.side = side
        self.register_buffer("freqs_cos", torch.empty(1, side * side, dim, **dd), persistent=False)
        self.register_buffer("freqs_sin", torch.empty(1, side * side, dim, **dd), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the tables."""
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Compute the tables, also after a module on the meta device got its memory."""
        side, half, device = self.side, self.freqs_cos.shape[-1] // 2, self.freqs_cos.device
        position = torch.arange(side, device=device, dtype=torch.float32) * (14 / side)
        frequency = 10000.0 ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
        angle = torch.outer(position, frequency).repeat_interleave(2, dim=1)  # [side, half]
        grid = (side, side, half)
        angle = torch.cat([angle[:, None].expand(grid), angle[None].expand(grid)], dim=-1).flatten(0, 1)
        self.freqs_cos.copy_(angle.cos())
        self.freqs_sin.copy_(angle.sin())

    def forward(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        base = (self.side, self.side)
        return resample_tokens(self.freqs_cos, size, base), resample_tokens(self.freqs_sin, size, base)


class LocalVimMixer(nn.Module):
    """Mamba mixer with weights of its own for each scanned direction (paper, section 3.3).

    in_proj; along each path a causal depthwise convolution, SiLU, the projection to dt, B and C, the scan; gate; BiAttn; out_proj.
    A window path pads the grid before the convolution, so its padded steps carry what the convolution writes there.

    Args:
        dim: channels of the tokens.
        paths: K path names.
        d_state: N, states per channel.
        d_conv: taps of the convolution.
        ssm_ratio: inner width over `dim`.
        class_token: the tokens hold a class token in the middle.
    """

    def __init__(
        self,
        dim: int,
        paths: tuple[str, ...],
        d_state: int = 16,
        d_conv: int = 4,
        ssm_ratio: float = 2.0,
        class_token: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        inner, k, rank = int(ssm_ratio * dim), len(paths), math.ceil(dim / 16)
        self.paths = paths
        self.d_state, self.dt_rank, self.class_token = d_state, rank, class_token

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d_weight = nn.Parameter(torch.empty(k, inner, d_conv, **dd))
        self.conv1d_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(k, inner, **dd))
        self.attn = BiAttn(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Initialise the parameters of the directions.

        As published, the projections of the step get the rule of every other linear layer, bias 0 included: steps start at
        softplus(0), not at Mamba's 0.001 to 0.1.
        """
        bound = self.conv1d_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.conv1d_weight, -bound, bound)
        nn.init.uniform_(self.conv1d_bias, -bound, bound)
        trunc_normal_(self.x_proj_weight, std=0.02)
        trunc_normal_(self.dt_projs_weight, std=0.02)
        self.dt_projs_bias.zero_()
        init_A_log_(self.A_logs)
        self.Ds.fill_(1.0)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of in_proj, each `(batch, L, inner)` like the tokens: what is convolved and scanned, and the gate."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return u, z

    def convolve(self, u: Tensor, paths: ScanPaths) -> Tensor:
        """The causal convolution along every path, before SiLU: `(batch, L, inner)` -> `(batch, K, L', inner)`.

        The last tap multiplies the current step, zeros come before the first.
        """
        k, inner, taps = self.conv1d_weight.shape
        x = F.pad(cross_scan(u, paths).mT.flatten(1, 2), (taps - 1, 0))
        x = F.conv1d(x, self.conv1d_weight.reshape(k * inner, 1, taps), self.conv1d_bias.flatten(), groups=k * inner)
        return x.unflatten(1, (k, inner)).mT

    def scan_inputs(self, x: Tensor, paths: ScanPaths) -> tuple[Tensor, Tensor, Tensor]:
        """What the scans and the gate are made of.

        Args:
            x: tokens `(batch, L, dim)`.
            paths: the K paths over their grid.

        Returns:
            In the order of the paths the convolved sequences `(batch, K, L', inner)` and their packed projections dt | B | C
            `(batch, K, L', R + 2N)`; and z, the gate before SiLU, `(batch, L, inner)`.
        """
        u, z = self.branches(x)
        v = F.silu(self.convolve(u, paths))
        return v, v @ self.x_proj_weight.mT, z

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix the tokens `(batch, H * W, dim)`, or `(batch, H * W + 1, dim)` with a class token, of a grid of `size` (H, W)."""
        paths = scan_paths(self.paths, size, self.class_token)
        v, x_dbl, z = self.scan_inputs(x, paths)
        dt, B, C = x_dbl.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = cross_selective_scan(
            v,
            dt,
            A_from_log(self.A_logs),
            B,
            C,
            self.Ds,
            paths=paths,
            dt_weight=self.dt_projs_weight,
            dt_bias=self.dt_projs_bias,
            order="scan",
        )
        y = cross_merge(y, paths, merge=False).flatten(2, -2)  # [B, K, L or L + 1, inner], raster order
        y = y * F.silu(z).unsqueeze(1)
        return self.out_proj(self.attn(y))


class LocalVimBlock(nn.Module):
    """Pre-norm residual block of one mixer, `(batch, L, dim)` to the same; see `LocalVimMixer` for the arguments.

    In the published code's words the sum that `norm` reads is the "residual" and what `mixer` returns is "hidden".
    """

    def __init__(
        self,
        dim: int,
        paths: tuple[str, ...],
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        class_token: bool = False,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5, **dd)
        self.mixer = LocalVimMixer(dim, paths, d_state=d_state, ssm_ratio=ssm_ratio, class_token=class_token, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x), size))


class LocalVim(nn.Module):
    """LocalVim (arXiv 2403.09338).

    Takes images of any size from one patch: they are zero-padded at the bottom and right to whole patches, and positions are
    interpolated.

    Args:
        img_size: image side or (height, width) in pixels for which `pos_embed` is made.
        patch_size: patch side in pixels.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "avg" over the patches, "token" for the class token, "" for none.
        embed_dim: C, channels of the tokens.
        depth: number of layers.
        paths: path names (`visionssm.ops`), one tuple per layer.
        d_state: N of the scan.
        ssm_ratio: inner width of the mixers over `embed_dim`.
        class_token: put a class token in the middle of the sequence.
        rope_grid: side of the grid for which the rotary tables are computed, 0 for no rotary positions.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic-depth rate of the last layer, growing linearly from 0.

    Raises:
        ValueError: `paths` that do not fit `depth`, an unknown path or pooling, rotary positions together with a class token,
            an `img_size` of no pixels.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 20,
        paths: Sequence[Sequence[str]] = SEARCHED_PATHS,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        class_token: bool = False,
        rope_grid: int = 14,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        paths = check_layer_paths(paths, depth)
        if class_token and rope_grid:
            raise ValueError(f"rope_grid: expected 0 with a class token, which has no place on the grid, got {rope_grid}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            _checked_size(img_size),
            patch_size,
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
            **dd,
        )
        height, width = self.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, height * width + class_token, embed_dim, **dd))
        self.rope = RotaryTables(embed_dim, rope_grid, **dd) if rope_grid else None
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(
            LocalVimBlock(embed_dim, names, d_state, ssm_ratio, class_token, drop_path=rate, **dd)
            for names, rate in zip(paths, rates, strict=True)
        )
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)]
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self.global_pool = self._checked_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(H, W) of the grid for which `pos_embed` is made."""
        return self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published.

        Args:
            needs_reset: False when the layers have just initialised themselves.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and isinstance(module, LocalVimMixer):
                module.reset_scan_parameters()
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        with torch.no_grad():
            for layer in self.layers:
                nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))
                layer.mixer.out_proj.weight.div_(math.sqrt(len(self.layers)))
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, class token, and what is 1-D for each direction, which a rule on dimensions alone would decay; A too."""
        names = ("pos_embed", "cls_token", "A_logs", "Ds", "dt_projs_bias", "conv1d_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay; a layer is one group, `coarse` or not."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification layer; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _checked_pool(self, global_pool: str) -> str:
        known = ("", "avg") if self.cls_token is None else ("", "avg", "token")
        if global_pool not in known:
            hint = "; token needs a class token" if global_pool == "token" else ""
            raise ValueError(f"global_pool: expected one of {known}, got {global_pool!r}{hint}")
        return global_pool

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make `pos_embed` for another image size; the function computed at any size changes only by this interpolation.

        Args:
            img_size: image side or (height, width) in pixels; None keeps the current size.

        Raises:
            ValueError: a side of no pixels.
        """
        old_size = self.grid_size
        self.patch_embed.set_input_size(_checked_size(self.patch_embed.img_size if img_size is None else img_size))
        if self.grid_size != old_size:
            pos_embed = resample_tokens(self.pos_embed.detach(), self.grid_size, old_size, self.cls_token is not None)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image -> tokens with positions, and the grid's (H, W)."""
        x = self.patch_embed(check_image(x, self.in_chans, self.patch_embed.patch_size[0]))
        batch, height, width, _ = x.shape
        size = (height, width)
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = insert_token(x, self.cls_token.expand(batch, -1, -1))
        return x + resample_tokens(self.pos_embed, size, self.grid_size, self.cls_token is not None), size

    def _layer(self, layer: LocalVimBlock, x: Tensor, size: tuple[int, int], tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """One layer on the stream, which is rotated before it."""
        if tables is not None:
            cos, sin = tables
            x = apply_rot_embed(x, sin, cos)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(layer, x, size)
        return layer(x, size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen layers: the residual stream after each, without the class token.

        Args:
            x: image `(batch, in_chans, H, W)`.
            indices: the last n layers if an int, all if None, else these layers.
            norm: apply the final norm to every feature.
            stop_early: skip the layers after the last one wanted.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: leave out the final feature.

        Returns:
            The features, or (what `forward_features` returns, features).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt: expected "NCHW" or "NLC", got {output_fmt!r}')
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x, size = self._embed(x)
        tables = None if self.rope is None else self.rope(size)
        for i, layer in enumerate(self.layers[: max_index + 1] if stop_early else self.layers):
            x = self._layer(layer, x, size, tables)
            if i in take_indices:
                feature = self.norm_f(x) if norm else x
                feature = feature if self.cls_token is None else take_token(feature)[0]
                if output_fmt == "NCHW":
                    feature = feature.unflatten(1, size).permute(0, 3, 1, 2).contiguous()
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self.norm_f(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given layers do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: drop the final norm.
            prune_head: drop the head.

        Returns:
            Indices of the layers kept as features.
        """
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `(batch, in_chans, H, W)` -> normed tokens `(batch, L, C)`, or `(batch, L + 1, C)` with the class token."""
        x, size = self._embed(x)
        tables = None if self.rope is None else self.rope(size)
        for layer in self.layers:
            x = self._layer(layer, x, size, tables)
        return self.norm_f(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits `(batch, num_classes)`, or the pooled feature `(batch, C)`."""
        if self.global_pool == "token":
            x = take_token(x)[1].squeeze(1)
        elif self.global_pool == "avg":
            x = (x if self.cls_token is None else take_token(x)[0]).mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _checked_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = to_2tuple(img_size)
    if min(size) < 1:
        raise ValueError(f"img_size: expected at least one pixel a side, got {size[0]} x {size[1]}")
    return size


_DIRECTION_KEY = re.compile(r"(?P<mixer>.*\.mixer\.)(?P<name>A_log|D|conv1d|x_proj|dt_proj)_(?P<k>\d+)(?P<leaf>\.weight|\.bias)?")
_STACKED = {
    "A_log": "A_logs",
    "D": "Ds",
    "conv1d.weight": "conv1d_weight",
    "conv1d.bias": "conv1d_bias",
    "x_proj.weight": "x_proj_weight",
    "dt_proj.weight": "dt_projs_weight",
    "dt_proj.bias": "dt_projs_bias",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published checkpoints -> our keys; our own state dicts pass unchanged.

    Takes the whole file's content or its weights, with `module.` or, of detectors and segmentors, `backbone.` prefixes. The latter
    norm the mixers' outputs (`outnorm_i`), which has no counterpart here, and have no final norm: the model's own stays.
    `pos_embed` of another grid is interpolated.

    Args:
        state_dict: names to tensors, or a dict that holds it under `state_dict` or `model`.
        model: the model that will load the result.

    Returns:
        A state dict for `model.load_state_dict(..., strict=True)`.

    Raises:
        ValueError: rotary tables in the checkpoint that are not the model's.
    """
    state_dict = unwrap(state_dict)
    dense = any(k.startswith("outnorm_") for k in state_dict)

    out, directions = {}, {}
    for key, value in state_dict.items():
        match = _DIRECTION_KEY.fullmatch(key)
        if match:
            name = _STACKED[match["name"] + (match["leaf"] or "")]
            value = value.squeeze(1) if name == "conv1d_weight" else value  # (E, 1, taps)
            directions.setdefault(match["mixer"] + name, {})[int(match["k"])] = value
        elif key in _ROTARY_TABLES and value.dim() == 2 and model.rope is not None:
            _check_rotary(key, value, model.rope)
        elif key.startswith("outnorm_"):
            continue
        else:
            out[key] = value
    out.update({key: torch.stack([values[k] for k in sorted(values)]) for key, values in directions.items()})
    if "pos_embed" in out:
        out["pos_embed"] = _fit_pos_embed(out["pos_embed"], model, published=bool(directions))
    if dense and "norm_f.weight" not in out and "norm_f.weight" in model.state_dict():
        out["norm_f.weight"] = model.norm_f.weight.detach().clone()
    return out


_ROTARY_TABLES = ("rope.freqs_cos", "rope.freqs_sin")


def _check_rotary(key: str, table: Tensor, rope: RotaryTables) -> None:
    """A checkpoint's rotary table, (positions, C), is that of a model of the same width."""
    side = math.isqrt(table.shape[0])
    ours = rope((side, side))[_ROTARY_TABLES.index(key)][0]
    if ours.is_meta or table.is_meta or ours.shape[1:] != table.shape[1:]:  # other widths fail when loaded
        return
    if ours.shape != table.shape or not torch.allclose(ours.float(), table.to(ours.device).float(), atol=1e-2):
        raise ValueError(
            f"{key}: the checkpoint's rotary table, {tuple(table.shape)}, is not that of this model, "
            f"made for rope_grid={rope.side}; try rope_grid={side}"
        )


def _fit_pos_embed(pos_embed: Tensor, model: nn.Module, published: bool) -> Tensor:
    """Resize a checkpoint's positions from the grid that its own image size says, ours (unless published), or a square one."""
    class_token = model.cls_token is not None
    patches = pos_embed.shape[1] - class_token
    grids = [(math.isqrt(patches),) * 2]
    if not published:
        grids.insert(0, model.grid_size)
    img_size = getattr(model, "pretrained_model_args", {}).get("img_size")
    if img_size is not None:
        grids.insert(0, model.patch_embed.dynamic_feat_size(to_2tuple(img_size)))
    for height, width in grids:
        if height * width == patches:
            return resample_tokens(pos_embed, model.grid_size, (height, width), class_token)
    return pos_embed  # fails when loaded, which names both shapes


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "origin_url": "https://github.com/hunto/LocalMamba",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    published_cfgs(
        {
            "local_vim_nano": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
            "local_vim_tiny": _cfg(),
            "local_vim_tiny_midclstok": _cfg(),
            "local_vim_small": _cfg(),
        }
    )
)


def _create_local_vim(variant: str, pretrained: bool = False, depth: int = 20, **kwargs: Any) -> LocalVim:
    quarters = tuple(depth * (i + 1) // 4 - 1 for i in range(4))  # (4, 9, 14, 19), as in the published detectors
    out_indices = kwargs.pop("out_indices", quarters)
    return build_model(
        LocalVim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        depth=depth,
        **kwargs,
    )


@register_model
def local_vim_nano(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """About a million parameters for images from 32 px: patches of 4 pixels, N = 4."""
    cross, local = ("h", "h_flip", "v", "v_flip"), ("h", "h_flip", "w2", "w2_flip")
    args = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 8,
        "paths": (cross, local) * 4,
        "d_state": 4,
        "rope_grid": 8,
    }
    return _create_local_vim("local_vim_nano", pretrained, **{**args, **kwargs})


@register_model
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T."""
    args = {"embed_dim": 192}
    return _create_local_vim("local_vim_tiny", pretrained, **{**args, **kwargs})


@register_model
def local_vim_tiny_midclstok(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle and no rotary positions."""
    args = {"embed_dim": 192, "class_token": True, "global_pool": "token", "rope_grid": 0}
    return _create_local_vim("local_vim_tiny_midclstok", pretrained, **{**args, **kwargs})


@register_model
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S with the paper's searched directions.

    The published code also registers this name with `paths=(("h", "h_flip", "w2", "w2_flip"),) * 20`; checkpoints cannot tell.
    """
    args = {"embed_dim": 384}
    return _create_local_vim("local_vim_small", pretrained, **{**args, **kwargs})
