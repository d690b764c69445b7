"""LocalVMamba: VMamba's first generation with searched scan paths in every block, windows among them, and channel attention.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", https://arxiv.org/abs/2403.09338.

Maps are channels-last throughout, (batch, H, W, C). A stage begins with its downsampling, so that a stage's output is its feature.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor

from visionssm.layers.local_mixer import BiAttn, check_layer_paths
from visionssm.layers.patch_embed import PatchStem
from visionssm.models import vmamba
from visionssm.models._checkpoint import build_model
from visionssm.weights.table import published_cfgs

__all__ = ["LocalVMamba"]

# Paper, figure 4: the directions found by the search, block by block. Their order binds the weights.
SEARCHED_PATHS_TINY = (
    ("h", "h_flip", "w7", "w7_flip"),
    ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h_flip", "v_flip", "w2_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v_flip", "w2_flip"),
    ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h", "w2_flip", "w7", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v_flip", "w7", "w7_flip"),
    ("h_flip", "v", "w2", "w7_flip"),
    ("v", "v_flip", "w2", "w7_flip"),
    ("h", "h_flip", "v_flip", "w2_flip"),
    ("v_flip", "w2_flip", "w7", "w7_flip"),
    ("h_flip", "v_flip", "w2_flip", "w7_flip"),
    ("h_flip", "v", "w7", "w7_flip"),
)
SEARCHED_PATHS_SMALL = (
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v_flip", "w2", "w7_flip"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w2"),
    ("v", "v_flip", "w2_flip", "w7"),
    ("h", "h_flip", "v", "w2"),
    ("h_flip", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v_flip", "w7"),
    ("h_flip", "v_flip", "w2_flip", "w7"),
    ("h_flip", "v", "v_flip", "w7_flip"),
    ("v", "v_flip", "w7", "w7_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h", "h_flip", "w7", "w7_flip"),
    ("h", "v_flip", "w2", "w2_flip"),
    ("h", "v_flip", "w2", "w7"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v_flip", "w7", "w7_flip"),
    ("h", "v", "w7", "w7_flip"),
)


class LocalVMamba(vmamba.VMamba):
    """LocalVMamba (arXiv 2403.09338).

    4x4 patches, patch merging, gated mixers without an MLP, BiAttn on every direction's scan before they are summed.

    Args:
        depths: blocks per stage.
        paths: path names (`visionssm.ops`), one tuple per block.
        d_state: N of the scan.
        ssm_ratio: inner width of the mixer over the stage's width.
        **kwargs: the other arguments of `VMamba`.

    Raises:
        ValueError: `paths` that do not fit `depths`, an unknown path, and as `VMamba`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 9, 2),
        paths: Sequence[Sequence[str]] = SEARCHED_PATHS_TINY,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depths=depths,
            paths=check_layer_paths(paths, sum(depths)),
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            mlp_ratio=0.0,
            gate=True,
            conv_bias=True,
            scan_attn=BiAttn,
            stem_layer=PatchStem,
            downsample_layer=PatchMerging,
            **kwargs,
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published checkpoints -> our keys, as VMamba's; our own state dicts pass unchanged."""
    state_dict = vmamba.checkpoint_filter_fn(state_dict, model)
    return {key.replace(".op.multi_scan.attn.", ".op.scan_attn."): value for key, value in state_dict.items()}


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
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "origin_url": "https://github.com/hunto/LocalMamba",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    published_cfgs(
        {
            "local_vmamba_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
            "local_vmamba_tiny": _cfg(),
            "local_vmamba_small": _cfg(),
        }
    )
)


def _create_local_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model(
        LocalVMamba,
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


@register_model
def local_vmamba_nano(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """About a million parameters for images from 32 px: stride 2, four stages, N = 1."""
    args = {
        "patch_size": 2,
        "depths": (2, 4, 2, 1),
        "embed_dim": (64, 96, 128, 128),
        "d_state": 1,
        "paths": (("h", "h_flip", "w2", "w2_flip"), ("h", "v_flip", "w2", "w7")) * 2 + (("h", "h_flip", "v", "v_flip"),) * 5,
    }
    return _create_local_vmamba("local_vmamba_nano", pretrained, **{**args, **kwargs})


@register_model
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T."""
    args = {"depths": (2, 2, 9, 2), "paths": SEARCHED_PATHS_TINY}
    return _create_local_vmamba("local_vmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S."""
    args = {"depths": (2, 2, 27, 2), "paths": SEARCHED_PATHS_SMALL}
    return _create_local_vmamba("local_vmamba_small", pretrained, **{**args, **kwargs})
