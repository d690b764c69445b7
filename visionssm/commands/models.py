"""`visionssm list` and `visionssm info`."""

from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import groupby

import timm
from timm.models import is_model, is_model_pretrained, list_models, list_pretrained, model_entrypoint
from torch import nn

from visionssm.errors import UserError, did_you_mean

PACKAGE = "visionssm.models."


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


def model_table(pattern: str | None = None, pretrained: bool = False) -> Iterator[str]:
    """Lines of a table: name, parameters, input, paper; each as soon as its model is counted.

    Args:
        pattern: part of a name, or a pattern with `*` and `?`.
        pretrained: only models with published weights.

    Raises:
        UserError: no such model.
    """
    names = zoo()
    if pattern is not None:
        wildcard = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
        names = [name for name in names if fnmatch(name, wildcard)]
        if not names:
            raise UserError(f"no model is called {pattern!r}{did_you_mean(pattern, zoo(), cutoff=0.4)}")
    if pretrained:
        names = [name for name in names if is_model_pretrained(name)]
        if not names:
            yield f"none of {'these' if pattern else 'the'} models has published weights in this version"
            return
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
        "weights": cfg.hf_hub_id or cfg.url or cfg.file or "none published in this version",
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
