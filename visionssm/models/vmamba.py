"""VMamba: a hierarchical backbone whose token mixer scans the map along rows and columns, both ways.

Paper: "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166 (NeurIPS 2024).

Three generations were published, all covered here: vanilla (4x4 patches, gated mixer, N = 16, no MLP), the pre-release "0220"
(gated mixer, N = 1, MLP) and today's (no gate, N = 1, MLP; `sXlY` = ssm_ratio X and Y blocks in the third stage).
Maps are channels-last throughout, (batch, H, W, C). A stage begins with its downsampling, so that a stage's output is its feature.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor

from visionssm.layers.patch_embed import ConvDownsample, ConvStem, PatchStem
from visionssm.layers.ss2d import SS2D
from visionssm.models._checkpoint import build_model, unwrap
from visionssm.ops import CROSS
from visionssm.weights.table import published_cfgs

__all__ = ["VMamba"]


class VSSBlock(nn.Module):
    """Pre-norm residual block: SS2D, then an MLP unless `mlp_ratio` is 0 (paper, figure 3).

    Args:
        dim: channels of the map.
        mlp_ratio: hidden width of the MLP over `dim`; 0 leaves the MLP out.
        drop: dropout inside the MLP.
        drop_path: stochastic-depth rate of both branches.
        mixer: builds the mixer from `dim`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        mixer: Callable[..., nn.Module] = SS2D,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.op = mixer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0.0:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=nn.GELU, drop=drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class VSSStage(nn.Module):
    """A downsampling (none in the first stage) and a row of blocks.

    Args:
        dim: channels of the incoming map.
        out_dim: channels of the stage.
        paths: one tuple of path names per block.
        drop_path: one stochastic-depth rate per block.
        downsample_layer: layer class that halves the map, or None.
        block: builds a block from a width, a rate and the block's mixer.
        mixer: builds a mixer from a width and path names.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        paths: Sequence[Sequence[str]],
        drop_path: Sequence[float],
        downsample_layer: Callable[..., nn.Module] | None,
        block: Callable[..., nn.Module],
        mixer: Callable[..., nn.Module],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample_layer is None else downsample_layer(dim, out_dim, **dd)
        self.blocks = nn.Sequential(
            *(
                block(out_dim, drop_path=rate, mixer=partial(mixer, paths=names), **dd)
                for names, rate in zip(paths, drop_path, strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class VMamba(nn.Module):
    """VMamba (arXiv 2401.10166), and the frame of LocalVMamba.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: timm's pooling name, `avg` as published.
        patch_size: total stride of the stem, pixels.
        depths: blocks per stage.
        embed_dim: width of the first stage, doubled from stage to stage; or one width per stage.
        d_state: N of the scan.
        ssm_ratio: inner width of the mixer over the stage's width.
        mlp_ratio: hidden width of the MLP over the stage's width, 0 for no MLP.
        paths: path names of the scan, one tuple for all blocks or one tuple per block.
        gate: gate the mixers.
        conv_bias: bias in the mixers' depthwise convolutions.
        scan_attn: see `SS2D`.
        stem_layer: layer class from image to map.
        downsample_layer: layer class between stages.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic-depth rate of the last block, growing linearly from 0.

    Raises:
        ValueError: `depths`, `embed_dim` and `paths` that do not fit each other.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dim: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        paths: Sequence[str] | Sequence[Sequence[str]] = CROSS,
        gate: bool = False,
        conv_bias: bool = False,
        scan_attn: Callable[..., nn.Module] | None = None,
        stem_layer: Callable[..., nn.Module] = ConvStem,
        downsample_layer: Callable[..., nn.Module] = ConvDownsample,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))] if isinstance(embed_dim, int) else list(embed_dim)
        if len(dims) != len(depths):
            raise ValueError(f"embed_dim: got {len(dims)} widths for {len(depths)} stages")
        block_paths = _paths_per_block(paths, sum(depths))
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.patch_embed = stem_layer(in_chans, dims[0], patch_size=patch_size, **dd)
        self.feature_info = []

        mixer = partial(SS2D, d_state=d_state, ssm_ratio=ssm_ratio, gate=gate, conv_bias=conv_bias, scan_attn=scan_attn)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, first = [], 0
        for i, depth in enumerate(depths):
            stages.append(
                VSSStage(
                    dims[max(i - 1, 0)],
                    dims[i],
                    paths=block_paths[first : first + depth],
                    drop_path=rates[i],
                    downsample_layer=downsample_layer if i > 0 else None,
                    block=partial(VSSBlock, mlp_ratio=mlp_ratio, drop=proj_drop_rate),
                    mixer=mixer,
                    **dd,
                )
            )
            first += depth
            self.feature_info += [{"num_chs": dims[i], "reduction": patch_size * 2**i, "module": f"layers.{i}"}]
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published: linear weights truncated normal of std 0.02, their biases 0, the rest by the layers' own rules.

        Args:
            needs_reset: False when the layers have just initialised themselves.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, SS2D) and needs_reset:
                module.reset_scan_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scan's decay rates, step biases and skips: 2-D or 3-D, so that a rule on dimensions alone would decay them."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_logs", "dt_projs_bias", "Ds"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: by stage if `coarse`, else by block."""
        blocks = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification layer; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages.

        Args:
            x: image `(batch, in_chans, H, W)`.
            indices: the last n stages if an int, all if None, else these stages.
            norm: apply the final norm to the last stage's feature.
            stop_early: skip the stages after the last one wanted.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final feature.

        Returns:
            The features, or (final feature `(batch, H', W', C)`, features).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt: expected "NCHW" or "NHWC", got {output_fmt!r}')
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        last = len(self.layers) - 1
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers[: max_index + 1] if stop_early else self.layers):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given stages do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: drop the final norm.
            prune_head: drop the head.

        Returns:
            Indices of the stages kept as features.
        """
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        shortened = max_index < len(self.layers) - 1
        self.layers = self.layers[: max_index + 1]
        if prune_norm or shortened:  # the final norm has the width of the last stage
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `(batch, in_chans, H, W)` -> normed map `(batch, H', W', C)`."""
        x = self.patch_embed(x)
        x = self.layers(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `(batch, H', W', C)` -> logits `(batch, num_classes)`, or the pooled feature."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _paths_per_block(paths: Sequence[str] | Sequence[Sequence[str]], depth: int) -> list[tuple[str, ...]]:
    if all(isinstance(name, str) for name in paths):
        return [tuple(paths)] * depth
    if len(paths) != depth:
        raise ValueError(f"paths: got {len(paths)} tuples of path names for {depth} blocks; expected one tuple, or one per block")
    return [tuple(names) for names in paths]


_PUBLISHED_NAMES = (
    # January 2024, then the index names of the sequential layers of later code
    (r"^patch_embed\.0\.", "patch_embed.{0}."),
    (r"^patch_embed\.2\.", "patch_embed.{1}."),
    (r"^patch_embed\.5\.", "patch_embed.conv2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

_LINEAR_WEIGHTS = (".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight", ".fc.weight", ".reduction.weight")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published checkpoints of every generation -> our keys; our own state dicts pass unchanged.

    Takes the whole file's content or its weights, with `module.` or, of detectors and segmentors, `backbone.` prefixes. The last of
    a dense model's output norms becomes `norm`; the others have no counterpart in a classifier.

    Args:
        state_dict: names to tensors, or a dict that holds it under `model` or `state_dict`.
        model: the model that will load the result.

    Returns:
        A state dict for `model.load_state_dict(..., strict=True)`.
    """
    state_dict = unwrap(state_dict)
    last = f"outnorm{len(model.layers) - 1}."
    state_dict = {k.replace(last, "norm."): v for k, v in state_dict.items() if k.startswith(last) or not k.startswith("outnorm")}
    if not any(k.startswith(("layers.0.downsample.", "patch_embed.0.")) for k in state_dict):
        return state_dict

    stem = ("conv1", "norm1") if isinstance(model.patch_embed, ConvStem) else ("proj", "norm")
    out = {}
    for published, value in state_dict.items():
        key = published
        for pattern, name in _PUBLISHED_NAMES:
            key = re.sub(pattern, name.format(*stem) if "{" in name else name, key)
        # a stage ends with its downsampling there and begins with it here
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        projection = state_dict.get(published.rsplit(".", 1)[0] + ".x_proj_weight")
        if key.endswith((".A_logs", ".Ds")) and projection is not None:  # (K * C, ...), direction-major
            value = value.unflatten(0, (projection.shape[0], -1))
        elif key.endswith(_LINEAR_WEIGHTS):  # (out, in, 1, 1) from channel-first code
            value = value.flatten(1)
        out[key] = value
    return out


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    published_cfgs(
        {
            "vmamba_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
            "vmamba_tiny_s1l8": _cfg(),
            "vmamba_small_s1l20": _cfg(),
            "vmamba_base_s1l20": _cfg(),
            "vmamba_tiny_s2l5": _cfg(),
            "vmamba_small_s2l15": _cfg(),
            "vmamba_base_s2l15": _cfg(),
            "vmamba_tiny_0220": _cfg(),
            "vanilla_vmamba_tiny": _cfg(first_conv="patch_embed.proj"),
            "vanilla_vmamba_small": _cfg(first_conv="patch_embed.proj"),
            "vanilla_vmamba_base": _cfg(first_conv="patch_embed.proj"),
        }
    )
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            "out_indices": out_indices,
            "flatten_sequential": True,
            "feature_cls": "getter",
        },  # maps as (batch, C, H, W), as detectors expect them
        **kwargs,
    )


_VANILLA = {
    "d_state": 16,
    "ssm_ratio": 2.0,
    "mlp_ratio": 0.0,
    "gate": True,
    "conv_bias": True,
    "stem_layer": PatchStem,
    "downsample_layer": PatchMerging,
}


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """About a million parameters for images from 32 px: stride 2, four stages."""
    args = {"patch_size": 2, "depths": (2, 4, 2, 1), "embed_dim": (64, 96, 128, 128)}
    return _create_vmamba("vmamba_nano", pretrained, **{**args, **kwargs})


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8]."""
    args = {"depths": (2, 2, 8, 2), "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20]."""
    args = {"depths": (2, 2, 20, 2), "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20]."""
    args = {"depths": (2, 2, 20, 2), "embed_dim": 128, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]."""
    args = {"depths": (2, 2, 5, 2), "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15]."""
    args = {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_small_s2l15", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15]."""
    args = {"depths": (2, 2, 15, 2), "embed_dim": 128, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **{**args, **kwargs})


@register_model
def vmamba_tiny_0220(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of 20 February 2024: gated mixers."""
    args = {"depths": (2, 2, 4, 2), "ssm_ratio": 2.0, "gate": True}
    return _create_vmamba("vmamba_tiny_0220", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-T, the first generation."""
    args = {"depths": (2, 2, 9, 2), **_VANILLA}
    return _create_vmamba("vanilla_vmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-S, the first generation."""
    args = {"depths": (2, 2, 27, 2), **_VANILLA}
    return _create_vmamba("vanilla_vmamba_small", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-B, the first generation."""
    args = {"depths": (2, 2, 27, 2), "embed_dim": 128, **_VANILLA}
    return _create_vmamba("vanilla_vmamba_base", pretrained, **{**args, **kwargs})
