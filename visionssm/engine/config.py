"""From a config file and the command line's changes to a config that has been checked."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from pkgutil import iter_modules
from typing import Any

from mmengine import registry as root
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from visionssm import registry
from visionssm.errors import UserError, did_you_mean, first_line
from visionssm.recipes import config_path

from .values import check_values

CLASSIFIERS = ("visionssm.ImageClassifier", "visionssm.DirectionSearch")
DATALOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
SHARED = ("data_root", "input_size")  # top-level keys that every data set gets which does not set its own

_RUNNER_KEYS = set(signature(Runner).parameters) | {
    "default_scope",
    "custom_imports",
    "model_wrapper_cfg",
    "compile",
    "runner_type",
    "strategy",
    *SHARED,
}
_REGISTRIES = (
    root.MODELS,
    root.DATASETS,
    root.DATA_SAMPLERS,
    root.FUNCTIONS,
    root.METRICS,
    root.HOOKS,
    root.OPTIMIZERS,
    root.OPTIM_WRAPPERS,
    root.PARAM_SCHEDULERS,
    root.LOOPS,
    root.VISUALIZERS,
    root.VISBACKENDS,
    root.LOG_PROCESSORS,
    root.STRATEGIES,
)
_INSTALL = "pip install 'visionssm[openmmlab]'"
_DATALOADER_ARGUMENTS = {*signature(DataLoader).parameters, "num_batch_per_epoch"}


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a config, apply the changes from the command line, hand shared values down to the data sets, check all names.

    Args:
        name: see `visionssm.config_path`.
        overrides: dotted key to new value.

    Raises:
        UserError: a file, key or argument that does not exist; names the nearest ones.
    """
    path = config_path(name)
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:  # a base config of mmdet or mmseg
        raise UserError(f"{path}: {first_line(error)}: {_INSTALL}") from error
    except Exception as error:  # a config is code: anything can be wrong in it
        raise UserError(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    for key in overrides or {}:
        _check_key(cfg, key)
    written = cfg.get("data_root")
    cfg.merge_from_dict(dict(overrides or {}))
    if written is not None:
        _move_data(cfg, written, cfg.data_root)
    scope = _imported_scope(cfg)
    for key in cfg:
        # a config may name helper variables of its own, so only what looks like a slip is refused
        if key not in _RUNNER_KEYS and (near := did_you_mean(key, _RUNNER_KEYS, cutoff=0.85)):
            raise UserError(f"{cfg.filename}: unknown key {key!r}{near}")
    for path, node in _walk(cfg):
        _check_arguments(path, node, scope)
    check_values(cfg)
    _check_schedule(cfg)
    for dataset in _datasets(cfg):
        accepted = set().union(*(_parameters(cls) or () for cls in _resolve(dataset["type"])))
        for key in accepted.intersection(SHARED, cfg):
            dataset.setdefault(key, cfg[key])
    return cfg


def fill_num_classes(cfg: Config) -> None:
    """Give a classifier's backbone, where it says nothing, the number of classes that the training data has."""
    if cfg.model.get("type") in CLASSIFIERS and "num_classes" not in cfg.model.backbone:
        dataset = root.DATASETS.build(cfg.train_dataloader.dataset)
        cfg.model.backbone.num_classes = len(dataset.metainfo["classes"])


def _check_schedule(cfg: Config) -> None:
    """Refuse a part of the schedule that begins after the end of training."""
    epochs = (cfg.get("train_cfg") or {}).get("max_epochs")
    for number, scheduler in enumerate(cfg.get("param_scheduler") or ()):
        begin, end = scheduler.get("begin", 0), scheduler.get("end")
        if end is not None and end <= begin:
            raise UserError(
                f"param_scheduler.{number}.end: got {end}, expected more than {begin}, where {scheduler['type']} begins"
            )
        if epochs is not None and scheduler.get("by_epoch", True) and begin >= epochs:
            raise UserError(
                f"train_cfg.max_epochs: got {epochs}, expected more than {begin}, where {scheduler['type']} begins; for a shorter "
                f"training lower param_scheduler.{number}.begin, and the end of what comes before it, too"
            )


def _imported_scope(cfg: Config) -> str | None:
    """The package whose types the config names without a prefix, imported.

    Raises:
        UserError: it, or what it needs, is not installed.
    """
    scope = cfg.get("default_scope")
    if scope not in (None, "mmengine", registry.SCOPE):
        try:
            import_module(f"{scope}.registry")
            import_module("mmcv.ops")
        except ImportError as error:
            raise UserError(f"{cfg.filename}: {scope} is needed: {first_line(error)}: {_INSTALL}") from error
    return scope


def _move_data(node: Any, old: str, new: str) -> None:
    """Paths below the `data_root` that a config was written with, to the one that it has now."""
    for key, value in node.items() if isinstance(node, Mapping | Config) else enumerate(node):
        if isinstance(value, str) and (value == old or value.startswith(f"{old.rstrip('/')}/")):
            node[key] = f"{new.rstrip('/')}{value.removeprefix(old.rstrip('/'))}"
        elif isinstance(value, Mapping | list):
            _move_data(value, old, new)


def _datasets(cfg: Config) -> Iterator[ConfigDict]:
    for name in DATALOADERS:
        if cfg.get(name):
            yield cfg[name]["dataset"]


def _check_key(cfg: Config, key: str) -> None:
    """Every part of an override but its last must exist; the last may be a new argument, which is checked as such."""
    node = cfg
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        known = list(map(str, range(len(node)))) if isinstance(node, list) else list(node)
        if part not in known:
            where = ".".join(parents[:depth]) or "the config"
            raise UserError(f"--cfg-options {key}: {where} has no {part!r}{did_you_mean(part, known)}")
        node = node[int(part)] if isinstance(node, list) else node[part]
        if not isinstance(node, (Mapping, list)):
            raise UserError(f"--cfg-options {key}: {'.'.join(parents[: depth + 1])} is {node!r} and has no keys")
    if not parents and last not in cfg and last not in _RUNNER_KEYS:
        raise UserError(f"--cfg-options {key}: the config has no {last!r}{did_you_mean(last, {*cfg, *_RUNNER_KEYS})}")


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """All dicts in a config, with their dotted path."""
    if isinstance(node, (Mapping, Config)):
        yield path, node
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    else:
        return
    for key, value in children:
        yield from _walk(value, f"{path}.{key}" if path else str(key))


def _check_arguments(path: str, node: Mapping, scope: str | None) -> None:
    """Refuse keys that the constructor of `type` does not take."""
    if path in DATALOADERS:
        allowed, what = _DATALOADER_ARGUMENTS, "DataLoader"
    elif isinstance(node.get("type"), str):
        prefix = node["type"].rpartition(".")[0]
        if (
            scope and prefix != registry.SCOPE
        ):  # mmdet and mmseg have types outside of registries, and arguments their builders take
            return
        found = _resolve(node["type"])
        if not found and (known := _names_like(node["type"])):
            raise UserError(f"{path}.type: unknown type {node['type']!r}{did_you_mean(node['type'], known)}")
        candidates = [parameters for cls in found if (parameters := _parameters(cls)) is not None]
        if not candidates:
            return
        allowed, what = set().union(*candidates), node["type"]
        if path == "optim_wrapper":
            allowed |= {"constructor", "paramwise_cfg", "optimizer"}
        if path.startswith("param_scheduler"):
            allowed |= {"convert_to_iter_based"}
    else:
        return
    for key in node:
        if key not in allowed and key not in ("type", "_scope_"):
            raise UserError(f"{path}.{key}: {what} has no such argument{did_you_mean(key, allowed)}")


def _own_types() -> list[str]:
    """All names that this package registers."""
    registries = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    return [f"{registry.SCOPE}.{name}" for own in registries for name in own.module_dict]


def _names_like(kind: str) -> list[str]:
    """All types that an unknown one could mean: of the registries, or of a module; none where that cannot be told."""
    prefix, _, name = kind.rpartition(".")
    if prefix in ("", registry.SCOPE):
        return [*_own_types(), *(name for searched in _REGISTRIES for name in searched.module_dict)]
    if "." not in prefix:  # another scope, or a package of that name, which may be missing here
        return []
    try:
        if find_spec(prefix) is None:  # its package is there, but has no such module
            package = prefix.rpartition(".")[0]
            return [f"{package}.{module.name}.{name}" for module in iter_modules(import_module(package).__path__)]
        return [f"{prefix}.{known}" for known in vars(import_module(prefix))]
    except Exception:  # whatever a package raises that does not work here; mmengine passes over it too
        return []


def _resolve(name: str) -> list[Callable]:
    """All classes or functions that registries know by this name."""
    found = []
    for searched in _REGISTRIES:
        try:
            found.append(searched.get(name))
        except RuntimeError:  # not in this registry
            continue
    return [cls for cls in found if cls is not None]


def _parameters(function: Callable) -> set[str] | None:
    """Names of the arguments, or None where any name goes."""
    parameters = signature(function).parameters
    return None if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()) else set(parameters)
