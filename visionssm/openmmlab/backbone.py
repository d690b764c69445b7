"""One backbone type for every OpenMMLab package, over any timm model that gives intermediate features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.models import group_parameters
from torch import Tensor, nn

from visionssm.engine.classifier import create_backbone
from visionssm.errors import UserError
from visionssm.layers.pos_embed import take_token
from visionssm.models._checkpoint import load_checkpoint
from visionssm.models.vmamba import VMamba
from visionssm.registry import MODELS
from visionssm.weights import load_weights

TAPS = ("stream", "norm", "mixer")
_MODEL, _OUT_NORM = "model.", "outnorm"


@MODELS.register_module()
class Backbone(BaseModule):
    """Feature maps of a timm model: `(batch, C_i, H_i, W_i)` for every level in `out_indices`, of images of any size.

    Keys of its state dict are the model's own ones and `outnorm{i}.weight`, `outnorm{i}.bias`, as `visionssm convert` writes them.
    timm's constructor, or the weights, initialise the model; a detector's `init_weights` leaves it alone.

    Args:
        model_name: a registered timm model, such as `vmamba_tiny_s1l8`.
        out_indices: levels to return: stages of a hierarchical model, layers of a plain one.
        pretrained: True for the published ImageNet weights; a checkpoint file, or the name of a published one as in
            `visionssm download`; False for none. A classifier's or a detector's file will do.
        tap: what a plain model's level is: "stream", the residual stream after the layer; "norm", the same through the
            model's last norm; "mixer", the output of the layer's mixer alone, as some published segmentors have it.
        out_norm: put every level through a LayerNorm of its own; None does so for VMamba and LocalVMamba, as published.
        frozen_stages: parts that neither learn nor drop: -1 none, 0 the stem, n the stem and the first n stages (layers).
        norm_eval: keep batch norms in evaluation mode.
        with_cp: recompute activations in the backward pass.
        **kwargs: further arguments of `timm.create_model`, such as `drop_path_rate`.

    Attributes:
        out_channels: channels of every level.
        strides: stride of every level, pixels.
        autocast_dtype: compute in it, and return float32, whatever precision surrounds the backbone; None for the latter's.

    Raises:
        UserError: an unknown model, argument, level or tap; weights that are not the model's.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool | str = False,
        tap: str = "stream",
        out_norm: bool | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model_name, str):
            raise UserError(f"model.backbone.model_name: got {model_name!r}, expected a name as in `visionssm list`")
        if "num_classes" in kwargs:
            raise UserError("model.backbone.num_classes: a backbone has no classifier; the heads have a num_classes of their own")
        model = create_backbone(model_name, pretrained=pretrained is True, num_classes=0, **kwargs)
        self.out_indices = _checked_levels(out_indices, model, model_name)
        self.tap = _checked_tap(tap, model, model_name)
        if isinstance(pretrained, (str, Path)):
            load_checkpoint(model, pretrained if Path(pretrained).is_file() else load_weights(str(pretrained)))
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=tap != "norm", prune_head=True)
        model.set_grad_checkpointing(with_cp)
        self.model = model
        levels = [model.feature_info[i] for i in self.out_indices]
        self.out_channels = tuple(level["num_chs"] for level in levels)
        self.strides = tuple(level["reduction"] for level in levels)
        self.out_norm = isinstance(model, VMamba) if out_norm is None else out_norm
        if self.out_norm:
            for i, channels in zip(self.out_indices, self.out_channels, strict=True):
                self.add_module(f"{_OUT_NORM}{i}", nn.LayerNorm(channels))
        self.norm_eval = norm_eval
        self.autocast_dtype: torch.dtype | None = None
        self._freeze(frozen_stages, model_name)
        self.register_state_dict_post_hook(_without_model)
        self.register_load_state_dict_pre_hook(_with_model)

    def init_weights(self) -> None:
        """Nothing: the constructor has initialised the model, or loaded its weights."""
        self._is_init = True

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode, but for what is frozen and, with `norm_eval`, the batch norms."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
            if frozen or (self.norm_eval and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image batch `(batch, in_chans, H, W)` -> one map `(batch, C_i, H_i, W_i)` per level, contiguous."""
        if self.autocast_dtype is None:
            return self._maps(x)
        with torch.autocast(x.device.type, self.autocast_dtype):
            maps = self._maps(x)
        return tuple(level.float() for level in maps)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `forward` returns, in the surrounding precision."""
        if self.tap == "mixer":
            maps = self._mixer_maps(x)
        else:
            last = isinstance(self.model, VMamba) and self.out_norm  # the norms read channels last
            maps = self.model.forward_intermediates(
                x,
                indices=list(self.out_indices),
                norm=self.tap == "norm",
                stop_early=True,
                output_fmt="NHWC" if last else "NCHW",
                intermediates_only=True,
            )
            maps = [level if last else level.permute(0, 2, 3, 1) for level in maps]
        if self.out_norm:
            maps = [getattr(self, f"{_OUT_NORM}{i}")(level) for i, level in zip(self.out_indices, maps, strict=True)]
        return tuple(level.permute(0, 3, 1, 2).contiguous() for level in maps)

    def _mixer_maps(self, x: Tensor) -> list[Tensor]:
        """The mixers' outputs, `(batch, H', W', dim)`, without the class token."""
        size = self.model.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        with self._recorded_mixers() as outputs:
            self.model.forward_intermediates(x, indices=list(self.out_indices), stop_early=True, intermediates_only=True)
        tokens = [outputs[i] for i in self.out_indices]
        patches = [take_token(y)[0] if y.shape[1] > size[0] * size[1] else y for y in tokens]
        return [y.unflatten(1, size) for y in patches]

    @contextmanager
    def _recorded_mixers(self) -> Iterator[dict[int, Tensor]]:
        """Inside, what the mixers of `out_indices` return is kept. A recomputation in the backward pass is not recorded again."""
        outputs: dict[int, Tensor] = {}
        handles = [
            self.model.layers[i].mixer.register_forward_hook(lambda _m, _x, y, i=i: outputs.__setitem__(i, y))
            for i in self.out_indices
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _freeze(self, stages: int, model_name: str) -> None:
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        last = max(groups.values())
        if type(stages) is not int or not -1 <= stages <= last:
            raise UserError(f"model.backbone.frozen_stages: {model_name} has {last} stages, got {stages!r}, expected -1 to {last}")
        for name, parameter in self.model.named_parameters():
            if groups[name] <= stages:
                parameter.requires_grad_(False)
        for level, i in enumerate(self.out_indices):
            if self.out_norm and i < stages:
                getattr(self, f"{_OUT_NORM}{self.out_indices[level]}").requires_grad_(False)


def _checked_levels(out_indices: Sequence[int], model: nn.Module, name: str) -> tuple[int, ...]:
    """Levels as ascending numbers from 0."""
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "prune_intermediate_layers")):
        raise UserError(f"model.backbone.model_name: {name} gives no intermediate features")
    count = len(model.feature_info)
    expected = f"model.backbone.out_indices: {name} has {count} levels, expected ascending numbers of 0 to {count - 1}"
    if not isinstance(out_indices, Sequence) or not all(type(i) is int and -count <= i < count for i in out_indices):
        raise UserError(f"{expected}, got {out_indices}")
    levels = tuple(i % count for i in out_indices)
    if not levels or list(levels) != sorted(set(levels)):
        raise UserError(f"{expected}, got {out_indices}")
    return levels


def _checked_tap(tap: str, model: nn.Module, name: str) -> str:
    if tap not in TAPS:
        raise UserError(f"model.backbone.tap: got {tap!r}, expected one of {', '.join(TAPS)}")
    if tap == "norm" and isinstance(model, VMamba):
        raise UserError(f"model.backbone.tap: {name} has a norm of its last stage only; out_norm=True norms every level")
    if tap == "mixer" and not all(hasattr(layer, "mixer") for layer in getattr(model, "layers", [None])):
        raise UserError(f"model.backbone.tap: 'mixer' is for Vim and LocalVim, got {name}")
    return tap


def _without_model(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: dict) -> None:
    """`model.layers...` -> `layers...`, in place and in order."""
    start = prefix + _MODEL
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(start) if key.startswith(start) else key] = value


def _with_model(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`layers...` -> `model.layers...`, in place and in order."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value, name = state_dict.pop(key), key.removeprefix(prefix)
        state_dict[key if name.startswith(_OUT_NORM) else f"{prefix}{_MODEL}{name}"] = value
