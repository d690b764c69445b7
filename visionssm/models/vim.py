"""Vim (Vision Mamba): a plain backbone of bidirectional Mamba blocks with a class token in the middle of the sequence.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
https://arxiv.org/abs/2401.09417 (ICML 2024).

The published generation with a middle class token ("midclstok"), patches of 16 pixels every 16 or every 8 pixels. Any image size:
the position embedding is resized at run time, its row for the class token kept apart.
"""

import math
import re
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    lecun_normal_,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor

from visionssm.layers.patch_embed import check_image
from visionssm.layers.pos_embed import insert_token, resample_tokens, take_token
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models._checkpoint import build_model, unwrap
from visionssm.weights.table import published_cfgs

__all__ = ["VisionMamba"]

_POOLS = ("token", "avg", "max", "avgmax", "")


class PatchEmbed(nn.Module):
    """Patch embedding whose patches may overlap: `(batch, in_chans, H, W)` -> `(batch, H', W', embed_dim)`.

    Pixels at the bottom and right that no longer fill a patch are left out, H' = (H - patch_size) // stride + 1.

    Args:
        img_size: image size the position embedding is made for, pixels, (H, W) or one side.
        patch_size: side of a patch, pixels.
        stride: distance between patches, pixels.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.

    Raises:
        ValueError: an `img_size` smaller than the patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, device=device, dtype=dtype)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the nominal image size."""
        size = to_2tuple(img_size)
        if min(size) < self.patch_size:
            raise ValueError(
                f"img_size: {size[0]} x {size[1]} pixels is smaller than one {self.patch_size} x {self.patch_size} patch"
            )
        self.img_size = size
        self.grid_size = self.dynamic_feat_size(size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of `img_size` (H, W)."""
        return tuple((side - self.patch_size) // self.stride + 1 for side in img_size)

    def forward(self, x: Tensor) -> Tensor:
        x = check_image(x, self.in_chans, self.patch_size)
        return self.proj(x).permute(0, 2, 3, 1)


class VimBlock(nn.Module):
    """Pre-norm residual block with one mixer and no MLP (paper, algorithm 1).

    Args:
        dim: channels of the tokens.
        drop_path: stochastic-depth rate.
        d_state: N of the scan.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, d_state: int = 16, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5, **dd)
        self.mixer = VimMixer(dim, d_state=d_state, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class VisionMamba(nn.Module):
    """Vim (arXiv 2401.09417, figure 2), with the class token in the middle.

    The residual stream stays in the parameters' dtype, float32 under autocast.

    Args:
        img_size: image size of the position embedding, pixels; other sizes resize it at run time.
        patch_size: side of a patch, pixels.
        stride: distance between patches, pixels; None for `patch_size`.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "token" (the class token, as published); "avg", "max" or "avgmax" of the patch tokens; "" for all tokens.
        embed_dim: channels of the tokens.
        depth: number of blocks.
        d_state: N of the scans.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic-depth rate of the last block, growing linearly from 0.

    Raises:
        ValueError: an image smaller than the patch, an unknown `global_pool`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(img_size, patch_size, stride or patch_size, in_chans, embed_dim, **dd)
        rows, columns = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns + 1, embed_dim, **dd))
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.Sequential(*(VimBlock(embed_dim, rate, d_state, **dd) for rate in rates))
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.patch_embed.stride, "module": f"layers.{i}"} for i in range(depth)
        ]
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published: residual branches scaled by 1 / sqrt(depth), embeddings and head truncated normal of std 0.02.

        Args:
            needs_reset: False when the layers have just initialised themselves.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif isinstance(module, VimMixer):
                    module.reset_scan_parameters()
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            for block in self.layers:
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings, the scans' decay rates, and biases and skips, 2-D only because two directions are stacked."""
        stacked = ("A_logs", "Ds", "dt_projs_bias", "conv1d_bias")
        return {"cls_token", "pos_embed"} | {n for n, _ in self.named_parameters() if n.endswith(stacked)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: the embeddings, then one group a block."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification layer; `global_pool=None` keeps the pooling."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make `img_size` (H, W), pixels, the size of the position embedding, by resizing it; None keeps the current size.

        Raises:
            ValueError: an image smaller than the patch.
        """
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(self.patch_embed.img_size if img_size is None else img_size)
        if self.patch_embed.grid_size != old_size:
            pos_embed = resample_tokens(self.pos_embed.detach(), self.patch_embed.grid_size, old_size, class_token=True)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _embed(self, x: Tensor) -> Tensor:
        """Image `(batch, in_chans, H, W)` -> tokens `(batch, L, dim)` with class token and positions."""
        x = self.patch_embed(x)  # [B, H', W', D]
        pos_embed = resample_tokens(self.pos_embed, (x.shape[1], x.shape[2]), self.patch_embed.grid_size, class_token=True)
        return insert_token(x.flatten(1, 2), self.cls_token.expand(x.shape[0], -1, -1)) + pos_embed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The residual stream after chosen blocks.

        Args:
            x: image `(batch, in_chans, H, W)`.
            indices: the last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: return pairs of feature and class token `(batch, 1, dim)`.
            norm: apply the final norm to every feature.
            stop_early: skip the blocks after the last one wanted.
            output_fmt: "NCHW" `(batch, dim, H', W')` or "NLC" `(batch, H' * W', dim)`.
            intermediates_only: leave out the final feature.

        Returns:
            The features, or (normed tokens after the last block `(batch, L, dim)`, features).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt: expected "NCHW" or "NLC", got {output_fmt!r}')
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        intermediates = []
        x = self._embed(x)
        for i, block in enumerate(self.layers[: max_index + 1] if stop_early else self.layers):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if i in take_indices:
                feature, token = take_token(self.norm_f(x) if norm else x)
                if output_fmt == "NCHW":
                    feature = feature.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
                intermediates.append((feature, token) if return_prefix_tokens else feature)
        if intermediates_only:
            return intermediates
        return self.norm_f(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given blocks do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: drop the final norm.
            prune_head: drop the head.

        Returns:
            Indices of the blocks kept as features.
        """
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `(batch, in_chans, H, W)` -> normed tokens `(batch, L, dim)`, the class token at index (L - 1) // 2."""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.layers, x)
        else:
            x = self.layers(x)
        return self.norm_f(x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens `(batch, L, dim)` -> `(batch, dim)`, or all of them with `global_pool=""`."""
        if not self.global_pool:
            return x
        if self.global_pool == "token":
            middle = (x.shape[1] - 1) // 2
            return x[:, middle : middle + 1].squeeze(1)  # an integer index would tie a compiled graph to one length
        return global_pool_nlc(take_token(x)[0], self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `(batch, L, dim)` -> logits `(batch, num_classes)`, or the pooled feature."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> str:
    if global_pool not in _POOLS:
        raise ValueError(f"global_pool: got {global_pool!r}, expected one of {', '.join(map(repr, _POOLS))}")
    return global_pool


_STACKED = {  # ours: the forward and the backward branch's published names
    "conv1d_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv1d_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
    "dt_projs_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_projs_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_logs": ("A_log", "A_b_log"),
    "Ds": ("D", "D_b"),
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published checkpoints -> our keys, and the position embedding to the model's grid; our own state dicts pass unchanged.

    Takes the whole file's content or its weights, with `module.` or, of detectors and segmentors, `backbone.` prefixes.

    Args:
        state_dict: names to tensors, or a dict that holds it under `model` or `state_dict`.
        model: the model that will load the result.

    Returns:
        A state dict for `model.load_state_dict(..., strict=True)`.

    Raises:
        ValueError: a layout that no model here has (rotary positions, no middle class token), an incomplete branch.
    """
    state_dict = unwrap(state_dict)
    if any(k.startswith("rope.") for k in state_dict):
        raise ValueError(
            "state_dict: has rotary position tables (rope.*), as LocalVim or a Vim of January 2024, class token first and "
            "positions rotated in every block; only the later generation, with a middle class token, is implemented"
        )
    if "pos_embed" in state_dict and "cls_token" not in state_dict:
        raise ValueError("state_dict: has no cls_token; only Vim with a middle class token is implemented")
    out = _stack_branches(state_dict)
    if "pos_embed" in out:
        out["pos_embed"] = _fit_pos_embed(out["pos_embed"], model)
    if isinstance(model.head, nn.Identity):
        out = {k: v for k, v in out.items() if not k.startswith("head.")}
    return out


def _stack_branches(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the two branches' tensors, which are published one by one; other tensors pass."""
    out = dict(state_dict)
    for mixer in [k.removesuffix("A_log") for k in state_dict if re.fullmatch(r"layers\.\d+\.mixer\.A_log", k)]:
        for ours, branches in _STACKED.items():
            missing = [mixer + name for name in branches if mixer + name not in out]
            if missing:
                raise ValueError(f"state_dict: lacks {' and '.join(missing)}; only bidirectional (v2) mixers are implemented")
            value = torch.stack([out.pop(mixer + name) for name in branches])
            out[mixer + ours] = value.squeeze(2) if ours == "conv1d_weight" else value  # (E, 1, 4) each
    return out


def _fit_pos_embed(pos_embed: Tensor, model: nn.Module) -> Tensor:
    """Resize a checkpoint's position embedding to the model's grid, from the grid its own image size gives, else a square one."""
    patches = pos_embed.shape[1] - 1
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or getattr(model, "pretrained_cfg", {}).get("input_size")
    grid = (0, 0) if size is None else model.patch_embed.dynamic_feat_size(to_2tuple(size)[-2:])
    if grid[0] * grid[1] != patches:
        grid = model.patch_embed.grid_size
    if grid[0] * grid[1] != patches:
        grid = to_2tuple(math.isqrt(patches))
    if grid[0] * grid[1] != patches:
        raise ValueError(f"state_dict: pos_embed has {patches} patch rows, which is neither the model's grid nor a square one")
    return resample_tokens(pos_embed, model.patch_embed.grid_size, grid, class_token=True)


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
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    published_cfgs(
        {
            "vim_nano": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
            "vim_tiny_patch16_224": _cfg(),
            "vim_tiny_patch16_stride8_224": _cfg(),
            "vim_small_patch16_224": _cfg(),
            "vim_small_patch16_stride8_224": _cfg(),
            "vim_base_patch16_224": _cfg(),
        }
    )
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """About a million parameters for images from 32 px: patches of 4 pixels, N = 4."""
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 160, "depth": 6, "d_state": 4}
    return _create_vim("vim_nano", pretrained, **{**args, **kwargs})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti."""
    args = {"embed_dim": 192}
    return _create_vim("vim_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+: a patch every 8 pixels."""
    args = {"embed_dim": 192, "stride": 8}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **{**args, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S."""
    args = {"embed_dim": 384}
    return _create_vim("vim_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+: a patch every 8 pixels."""
    args = {"embed_dim": 384, "stride": 8}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **{**args, **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B."""
    args = {"embed_dim": 768}
    return _create_vim("vim_base_patch16_224", pretrained, **{**args, **kwargs})
