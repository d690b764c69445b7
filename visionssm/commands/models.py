"""`visionssm list` and `visionssm info`."""

from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import groupby

import timm
from timm.models import is_model, list_models, list_pretrained, model_entrypoint
from torch import nn

from visionssm.errors import UserError, did_you_mean
from visionssm.weights import checkpoints

PACKAGE = "visionssm.models."
_FIGURES = {"top1": "top-1", "box_AP": "box AP", "mask_AP": "mask AP", "mIoU_single_scale": "mIoU"}


def zoo() -> list[str]:
    """The models of this package, family by family."""
    own = [name for name in list_models() if _module(name).startswith(PACKAGE)]
    return sorted(own, key=_module)


def check_model(name: str) -> None:
    """Refuse a name that is not in the zoo; `arch.tag` is looked up as `arch`.

    Raises:
        UserError: an unknown name, or a model of timm's own; names the nearest ones.
    """
    architecture = name.split(".")[0]
    if is_model(architecture) and not _module(architecture).startswith(PACKAGE):
        raise UserError(f"{architecture} is a model of timm's own, not of visionssm; visionssm list shows all")
    if not is_model(architecture):
        near = did_you_mean(architecture, zoo()) or "; visionssm list shows all"
        raise UserError(f"unknown model {architecture!r}{near}")
    tags = [known for known in list_pretrained() if known.split(".")[0] == architecture]
    if name != architecture and name not in tags:
        raise UserError(f"{architecture} has no weights called {name!r}; it has {', '.join(tags) or 'none at all in this version'}")


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_table(pattern: str | None = None) -> Iterator[str]:
    """Lines of a table: name, parameters, input, paper; each as soon as its model is counted.

    Args:
        pattern: part of a name, or a pattern with `*` and `?`.

    Raises:
        UserError: no such model.
    """
    names = _matching(zoo(), pattern, "model")
    width = max(map(len, names))
    yield f"{'model':{width}}  parameters  {'input':>9}  paper"
    for _, family in groupby(names, _module):
        models = [timm.create_model(name, device="meta") for name in family]
        for model in sorted(models, key=parameters):
            cfg = model.pretrained_cfg
            size = "{1} x {2}".format(*cfg["input_size"])
            paper = f"{cfg['paper_name'].split(':')[0]}, {cfg['paper_ids']}"
            yield f"{cfg['architecture']:{width}}  {parameters(model) / 1e6:8.2f} M  {size:>9}  {paper}"
    yield ""
    yield "more about one of them: visionssm info NAME"


def checkpoint_table(pattern: str | None = None) -> Iterator[str]:
    """Lines of a table of the published checkpoints: name, task, what their authors report, licence as stated.

    Args:
        pattern: part of a name, or a pattern with `*` and `?`.

    Raises:
        UserError: no such checkpoint.
    """
    rows = {row.name: row for row in checkpoints(status=None)}
    names = _matching(list(rows), pattern, "checkpoint")
    width = max(map(len, names))
    yield f"{'checkpoint':{width}}  {'task':14}  {'reported':24}  licence"
    for name in names:
        row = rows[name]
        figures = ", ".join(f"{title} {row.reported[key]}" for key, title in _FIGURES.items() if key in row.reported)
        status = "" if row.status == "available" else f"  ({row.status})"
        yield f"{name:{width}}  {row.task:14}  {figures:24}  {row.origin.license}{status}"
    yield ""
    yield "fetch one of them: visionssm download NAME.TAG"


def model_page(name: str) -> Iterator[str]:
    """Lines that describe one model.

    Raises:
        UserError: no such model.
    """
    check_model(name)
    model = timm.create_model(name, device="meta")
    cfg = timm.get_pretrained_cfg(name)
    levels = timm.create_model(name, device="meta", features_only=True).feature_info
    architecture = name.split(".")[0]
    yield f"{name}: {model_entrypoint(architecture).__doc__.splitlines()[0]}"
    yield ""
    facts = {
        "parameters": f"{parameters(model):,}",
        "input size": f"{' x '.join(map(str, cfg.input_size))}{' only' if cfg.fixed_input_size else ', other sizes too'}",
        "classes": f"{cfg.num_classes}",
        "features": f"channels {_words(levels.channels())} at strides {_words(levels.reduction())}",
        "scan paths": list(_scan_paths(model)),
        "preprocessing": f"{cfg.interpolation} resize, crop {cfg.crop_pct}, mean ({_words(cfg.mean)}), std ({_words(cfg.std)})",
        "weights": _weights(name),
        "paper": f"{cfg.paper_name}, https://arxiv.org/abs/{cfg.paper_ids.removeprefix('arXiv:')}",
        "first published at": cfg.origin_url,
    }
    width = max(map(len, facts))
    for title, fact in facts.items():
        lines = fact if isinstance(fact, list) else [fact]
        yield f"{title:{width}}  {lines[0]}"
        yield from (f"{'':{width}}  {line}" for line in lines[1:])
    yield ""
    yield f'in Python: import timm, visionssm; model = timm.create_model("{name}")'


def _matching(names: list[str], pattern: str | None, what: str) -> list[str]:
    if pattern is None:
        return names
    wildcard = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [name for name in names if fnmatch(name, wildcard)]
    if not found:
        raise UserError(f"no {what} is called {pattern!r}{did_you_mean(pattern, names, cutoff=0.4)}")
    return found


def _weights(name: str) -> list[str]:
    """The published checkpoints of a model, or the one of a tag: a line each, and their notes."""
    rows = checkpoints(name if "." in name else f"{name}.*", status=None)
    lines = []
    for row in rows:
        lines.append(f"{row.name}: {row.url or row.status}")
        lines += [f"  {note}" for note in row.notes]
    return (
        [*lines, f"licence: {rows[0].origin.license}. {rows[0].origin.license_note}"]
        if rows
        else ["none published in this version"]
    )


def _module(name: str) -> str:
    return model_entrypoint(name).__module__


def _scan_paths(model: nn.Module) -> Iterator[str]:
    """The paths of the layers from first to last, one line for neighbours that scan alike."""
    layers = [module.paths for module in model.modules() if isinstance(getattr(module, "paths", None), tuple)]
    first = 0
    for paths, alike in groupby(layers):
        last = first + len(list(alike)) - 1
        if last - first + 1 == len(layers):
            where = f"all {len(layers)} layers"
        else:
            where = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield f"{_words(paths)} ({where})"
        first = last + 1


def _words(values: object) -> str:
    return ", ".join(map(str, values))
