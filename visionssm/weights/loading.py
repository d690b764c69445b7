"""From a name or a timm config to the weights: find, download, read, select."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from torch import Tensor

from visionssm.errors import UserError

from .cache import UnreachableError, fetch
from .reading import read_checkpoint, select_weights
from .table import Checkpoint, checkpoints, find, published_entry


@dataclass(frozen=True)
class Source:
    """Weights as their file has them, and the name to call it by in messages."""

    name: str
    weights: dict[str, Tensor]


def download(name: str, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The file of a published checkpoint, downloaded unless it is in the cache.

    Args:
        name: `model.tag`, or a model's name for its only classifier.
        cache_dir: where downloads are kept; None is the standard place, see `fetch`.
        progress: show a bar.

    Raises:
        UserError: an unknown name, one without a file, or a failed download.
    """
    return _download(find(name), cache_dir, progress)


def load_weights(name: str, entry: str | None = None) -> dict[str, Tensor]:
    """The weights of a published checkpoint under the names of its file, on the CPU.

    Args:
        name: as `download`.
        entry: the entry that holds them, e.g. "model_ema"; None takes the one that the table names.

    Raises:
        UserError: as `download`; or a file that is refused, broken or lacks the entry.
    """
    row = find(name)
    return select_weights(read_checkpoint(_download(row)), entry or row.entry, row.name)


def load_source(cfg: PretrainedCfg, variant: str, cache_dir: str | Path | None = None) -> Source | None:
    """The weights that a timm config points to with `file`, `url` or `hf_hub_id` and `hf_hub_filename`.

    Args:
        cfg: the config.
        variant: the model's name.
        cache_dir: as `download`.

    Returns:
        None where timm itself is to look: its state dict, a folder or hub repository in timm's own format, or no weights at all.

    Raises:
        UserError: as `load_weights`; or the table says why there is no file.
    """
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return None
    if cfg.file:
        return Source(str(cfg.file), select_weights(read_checkpoint(cfg.file), published_entry(cfg.file), str(cfg.file)))
    if cfg.hf_hub_id and cfg.hf_hub_filename:
        url = f"hf://{cfg.hf_hub_id}/{cfg.hf_hub_filename}"
    elif cfg.url and not cfg.hf_hub_id:
        url = cfg.url
    else:
        if not cfg.hf_hub_id and checkpoints(f"{variant}.*", "classification", status=None):
            find(variant)  # raises, with the reason
        return None
    rows = [row for row in checkpoints(f"{variant}.*") if row.url == url]
    row = rows[0] if rows else Checkpoint(family="", model=variant, tag=cfg.tag or "", task="classification", url=url)
    name = row.name if rows else url
    return Source(name, select_weights(read_checkpoint(_download(row, cache_dir)), row.entry, name))


def _download(row: Checkpoint, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """From the first of a file's addresses that serves it."""
    known: dict[str, Any] = {"sha256": row.sha256, "progress": progress, "cache_dir": cache_dir}
    try:
        return fetch(row.shipped_file or row.url, **known)
    except UnreachableError:
        for url in row.other_urls:
            with contextlib.suppress(UnreachableError):
                return fetch(url, **known)
        raise
    except OSError as error:
        raise UserError(f"{row.name}: {error}") from error
