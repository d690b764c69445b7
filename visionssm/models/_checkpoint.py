"""From a checkpoint to the weights of one model, and from a published name to a model with weights."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from visionssm.errors import UserError, first_line, shortened
from visionssm.weights.loading import load_source
from visionssm.weights.reading import read_checkpoint, select_weights
from visionssm.weights.table import published_entry

FilterFn = Callable[[dict[str, Any], nn.Module], dict[str, Tensor]]
_BACKBONE = "backbone."
_CLASSIFIER = "head."  # in every family


def unwrap(state_dict: dict[str, Any], entry: str | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint file's content, under bare names.

    Args:
        state_dict: names to tensors, or a dict that holds it, see `visionssm.weights.select_weights`; names may begin with
            `module.`, once or twice. If any name begins with `backbone.`, a detector's or segmentor's, only those are kept.
        entry: which entry of the content to take.

    Returns:
        Names to tensors, in the same order.
    """
    weights = strip_wrappers(select_weights(state_dict, entry))
    if any(name.startswith(_BACKBONE) for name in weights):
        weights = {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}
    return weights


def strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `module.` that data parallelism and moving averages put before them, once each.

    Raises:
        UserError: two names that become one.
    """
    bare = {name.removeprefix("module.").removeprefix("module."): value for name, value in weights.items()}
    if len(bare) < len(weights):
        raise UserError(f"checkpoint: {len(weights) - len(bare)} names occur with and without the prefix module.")
    return bare


def load_checkpoint(model: nn.Module, source: str | Path | dict[str, Any], entry: str | None = None) -> None:
    """Load a published checkpoint, of whichever generation of key names, or one of ours, completely or not at all.

    Args:
        model: a model of this zoo. A classifier in the file is left out if the model has none.
        source: a checkpoint file, read without running anything in it; or its content; or a state dict.
        entry: which entry of the content holds the weights, e.g. "model_ema"; None takes what the table of published files says of
            a file of this name, else "model" or "state_dict".

    Raises:
        TypeError: `source` is none of these, or the model none of this zoo.
        UserError: a file that cannot be read, or a checkpoint of another variant; the message lists a few missing, unexpected and
            misshapen parameters. A ValueError.
    """
    name = "checkpoint"
    if isinstance(source, (str, Path)):
        name, entry, source = str(source), entry or published_entry(source), read_checkpoint(source)
    if not isinstance(source, dict):
        raise TypeError(f"source: expected a path or a dict of a checkpoint file, got {type(source).__name__}")
    family = sys.modules[type(model).__module__]
    if not hasattr(family, "checkpoint_filter_fn"):
        raise TypeError(f"model: expected one of visionssm's models, got {type(model).__name__}")
    weights = own_names(unwrap(source, entry), model, family.checkpoint_filter_fn, name)
    if not model.num_classes:
        weights = {key: value for key, value in weights.items() if not key.startswith(_CLASSIFIER)}
    check_fit(weights, model, name)
    model.load_state_dict(weights, strict=True)


def own_names(weights: dict[str, Tensor], model: nn.Module, filter_fn: FilterFn, source: str = "checkpoint") -> dict[str, Tensor]:
    """What a family's `checkpoint_filter_fn` makes of weights; what it stumbles over is told in one line.

    Raises:
        UserError: weights of another model.
    """
    try:
        return filter_fn(weights, model)
    except (ValueError, RuntimeError, IndexError) as error:
        reason = first_line(error).removeprefix("state_dict: ")
        raise UserError(f"{source}: of another model than this {type(model).__name__}: {reason}") from error


def check_fit(weights: dict[str, Tensor], model: nn.Module, source: str = "checkpoint", ignored: Sequence[str] = ()) -> None:
    """Refuse weights that are not the model's.

    Args:
        weights: names to tensors.
        model: the model to load them into.
        source: names the checkpoint in the message.
        ignored: modules whose parameters may be missing, left over or of another shape.

    Raises:
        UserError: lists a few missing, unexpected and misshapen parameters.
    """
    own = model.state_dict()
    shapes = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in weights.items() if k in own and v.shape != own[k].shape]
    reasons = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of other shapes": shapes,
    }
    prefixes = tuple(f"{module}." for module in ignored)
    reasons = {what: [name for name in names if not name.startswith(prefixes)] for what, names in reasons.items()}
    if any(reasons.values()):
        listing = "; ".join(f"{what} {shortened(names, 3)}" for what, names in reasons.items() if names)
        raise UserError(f"{source}: of another model than this {type(model).__name__}: {listing}")


def build_model(
    model_cls: type[nn.Module], variant: str, pretrained: bool, pretrained_filter_fn: FilterFn, **kwargs: Any
) -> nn.Module:
    """Timm's `build_model_with_cfg`, but weights from a URL or a file come through `visionssm.weights`.

    timm then adapts the clean weights to `num_classes`, `in_chans` and `features_only` as it does its own.

    Raises:
        UserError: weights that are not published, cannot be had or read, or are of another model.
    """
    source = None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        source = load_source(cfg, variant, kwargs.get("cache_dir"))
    if source is None:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
    features_only = kwargs.get("features_only", False)

    def filter_fn(_: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        weights = own_names(source.weights, model, pretrained_filter_fn, source.name)
        new_classifier = features_only or model.num_classes != cfg.num_classes  # timm's rule for leaving the file's out
        expected = weights | _as_the_model_has(weights, model, f"{cfg.first_conv}.weight")
        check_fit(expected, model, source.name, ignored=(cfg.classifier,) if new_classifier else ())
        return weights

    # timm copies its config, so the weights do not travel in it: an entry that only says where they come from stands for them.
    kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": {"source": source.name}}
    model = build_model_with_cfg(model_cls, variant, True, pretrained_filter_fn=filter_fn, **kwargs)
    for built in (model, getattr(model, "model", None)):  # with features_only a wrapper and what it wraps
        if built is not None:
            built.pretrained_cfg.pop("state_dict")
    return model


def _as_the_model_has(weights: dict[str, Tensor], model: nn.Module, stem: str) -> dict[str, Tensor]:
    """The first convolution's weight with the model's number of input channels, to which timm will bring it."""
    if stem not in weights or weights[stem].dim() != 4:
        return {}
    theirs, ours = weights[stem], model.get_parameter(stem)
    return {stem: ours} if (theirs.shape[0], theirs.shape[2:]) == (ours.shape[0], ours.shape[2:]) else {}
