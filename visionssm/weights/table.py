"""The published checkpoints, read from checkpoints.json beside this file.

The table is data: where each file lies, what its authors report of it, under which licence, and what is wrong with it.
"""

import json
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from visionssm.errors import UserError, did_you_mean, shortened

SHIPPED = Path(__file__).parent / "files"  # our own weights, a few MB
_PACKAGE = "package://"

STATUSES = ("available", "mislinked", "unreleased", "unsupported")


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one family share: where they come from, and the licence as stated."""

    origin: str
    paper: str
    title: str
    license: str
    license_note: str


@dataclass(frozen=True)
class Checkpoint:
    """One published file.

    Attributes:
        family: name of the `Family` it belongs to.
        model: our model's name; None where no model of ours has its layout.
        tag: names the file among those of the model, as in timm's `model.tag`.
        task: "classification", "detection" or "segmentation".
        url: https://..., hf://owner/repository[@revision]/file, or package://file for one in this package's weights/files/; None
            where there is no file.
        status: "available", or why it is not: one of `STATUSES`.
        other_urls: older addresses of the same file name.
        size_mb: its size in MB of 10^6 bytes, rounded, as a listing states it; None where unknown.
        sha256: its hash as reported; None where unknown.
        entry: which entry of the file holds the weights ("model", "model_ema", "state_dict"); None takes the only one.
        reported: the authors' figures, by name.
        config: the authors' config for it, a path in their repository.
        log: address of the training log.
        log_tta: address of the log of the test with augmentation.
        preprocessing: what differs from the model's own in timm's config, such as `input_size`.
        notes: what one should know before use, in sentences.
        classes: names of a classifier's classes, in the order of the labels, where they are not ImageNet's.
        license: the file's own, where it is not the family's.
        license_note: likewise.
    """

    family: str
    model: str | None
    tag: str
    task: str
    url: str | None
    status: str = "available"
    other_urls: tuple[str, ...] = ()
    size_mb: float | None = None
    sha256: str | None = None
    entry: str | None = None
    reported: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    log: str | None = None
    log_tta: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    license: str | None = None
    license_note: str | None = None

    @property
    def name(self) -> str:
        """`model.tag`."""
        return f"{self.model}.{self.tag}" if self.model else self.tag

    @property
    def hub_file(self) -> tuple[str, str] | None:
        """Repository (with @revision, if one is stated) and file on the Hugging Face hub; None where the file lies elsewhere."""
        if self.url is None or not self.url.startswith("hf://"):
            return None
        owner, repository, file = self.url.removeprefix("hf://").split("/", 2)
        return f"{owner}/{repository}", file

    @property
    def shipped_file(self) -> Path | None:
        """The file in this package; None where it lies elsewhere."""
        if self.url is None or not self.url.startswith(_PACKAGE):
            return None
        return SHIPPED / self.url.removeprefix(_PACKAGE)

    @property
    def origin(self) -> Family:
        """The family's facts, with the file's own licence."""
        own = {"license": self.license, "license_note": self.license_note}
        return replace(families()[self.family], **{key: value for key, value in own.items() if value})


@cache
def families() -> dict[str, Family]:
    """The families by name."""
    return {name: Family(**facts) for name, facts in _table()["families"].items()}


@cache
def _checkpoints() -> tuple[Checkpoint, ...]:
    lists = ("other_urls", "notes", "classes")
    return tuple(
        Checkpoint(**{key: tuple(value) if key in lists else value for key, value in row.items()})
        for row in _table()["checkpoints"]
    )


@cache
def _table() -> dict[str, Any]:
    return json.loads((files(__package__) / "checkpoints.json").read_text(encoding="utf-8"))


def checkpoints(pattern: str = "*", task: str | None = None, status: str | None = "available") -> list[Checkpoint]:
    """The checkpoints whose names match.

    Args:
        pattern: for `Checkpoint.name`, with `*` and `?`.
        task: only those of this task; None takes all.
        status: only those of this status; None takes all, also those of which there is no file.
    """
    return [
        row for row in _checkpoints() if fnmatch(row.name, pattern) and task in (None, row.task) and status in (None, row.status)
    ]


def find(name: str) -> Checkpoint:
    """The checkpoint of a name, `model.tag`, or a model's first one for classification, which is timm's default as well.

    Raises:
        UserError: no such checkpoint, or one without a file that our models can read; says why.
    """
    rows = checkpoints(name, status=None) if "." in name or name in (row.tag for row in _checkpoints()) else []
    rows = rows or checkpoints(f"{name}.*", task="classification", status=None)
    if not rows or any(sign in name for sign in "*?["):
        tags = [row.name for row in checkpoints(f"{name.split('.')[0]}.*")]
        near = did_you_mean(name, [row.name for row in checkpoints()]) or "; visionssm list --pretrained shows all"
        raise UserError(f"no published checkpoint is called {name!r}{f'; its model has {shortened(tags)}' if tags else near}")
    row = rows[0]
    if row.status != "available":
        raise UserError(f"{row.name} is {row.status}: {' '.join(row.notes)}")
    return row


def published_entry(file: str | Path) -> str | None:
    """The entry that holds the weights in a published file of this name; None where there is nothing to choose or know."""
    names = {(row.url or "").rpartition("/")[2]: row.entry for row in _checkpoints()}
    return names.get(Path(file).name)


def published_cfgs(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add what is published of each model to timm's pretrained configs.

    Args:
        cfgs: a config by model name.

    Returns:
        A config by `model.tag`, one for each available classifier of the table, or by `model` where there is none. The first tag
        is timm's default.
    """
    result = {}
    for model, cfg in cfgs.items():
        rows = checkpoints(f"{model}.*", task="classification")
        for row in rows:
            result[row.name] = cfg | _timm_images(row, cfg) | _timm_source(row)
            result[row.name] |= {"license": row.origin.license, "notes": row.notes or None}
        if not rows:
            result[model] = cfg
    return result


def _timm_images(row: Checkpoint, cfg: dict[str, Any]) -> dict[str, Any]:
    """What the file's own images change in a model's config."""
    own = dict(row.preprocessing)
    if "input_size" in own:
        own["input_size"] = tuple(own["input_size"])
        if cfg.get("pool_size"):
            own["pool_size"] = tuple(extent * own["input_size"][-1] // cfg["input_size"][-1] for extent in cfg["pool_size"])
    return own


def _timm_source(row: Checkpoint) -> dict[str, Any]:
    """Where timm's config says that the file lies, and what it classifies."""
    if row.shipped_file:
        return {"file": str(row.shipped_file), "num_classes": len(row.classes), "label_names": list(row.classes)}
    if row.hub_file is None:
        return {"url": row.url}
    repository, file = row.hub_file
    return {"url": "", "hf_hub_id": repository, "hf_hub_filename": file}
