"""Scan paths as data: the order in which a selective scan visits the positions of a map.

A path is an index table: entry t names the raster index `h * W + w` that the scan visits at step t, -1 a padded step.

    h     row by row                                        v     column by column, down the first column first
    wK    K x K windows in raster order, each in raster order; the map is padded at the bottom and right to multiples of K
    X_flip   the steps of X, padding included, in reverse

Sources: VMamba (arXiv 2401.10166, section 4.2) for h, v and their flips; LocalMamba (arXiv 2403.09338, section 3.2) for wK;
Vim (arXiv 2401.09417, algorithm 1) for the pair h, h_flip on a 1 x L map. The way back is the true inverse at every H x W.

Only numpy arrays are cached: a cached tensor would carry inference mode or fake tensors from one call into the next.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass

import numpy as np
import torch

CROSS = ("h", "v", "h_flip", "v_flip")
"""VMamba's four directions, in the order of its weights."""

BIDIRECTIONAL = ("h", "h_flip")
"""Vim's two directions over a sequence seen as a 1 x L map."""

LOCAL = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
"""The eight words that LocalMamba's direction search chooses from, in its order."""

MAX_WINDOW = 1024
"""The largest K of a window path wK: a small map is padded to K x K steps."""

_NAME = re.compile(r"(?P<kind>h|v|w(?P<window>[1-9][0-9]*))(?P<flip>_flip)?")


@dataclass(frozen=True)
class PathSpec:
    """One parsed path name. `window` is K for wK and 0 otherwise; `column` and `flip` say what their names say."""

    column: bool
    window: int
    flip: bool


def parse_path(name: str) -> PathSpec:
    """Parse a path name such as `"v_flip"` or `"w7"`.

    Raises:
        ValueError: the name is none of h, v, wK and their flips; the message names the nearest known word.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        near = difflib.get_close_matches(str(name), LOCAL, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"paths: unknown path {name!r}{hint} (known: h, v, wK for any window K >= 1, each with or without _flip)")
    window = int(match["window"] or 0)
    if window > MAX_WINDOW:
        raise ValueError(f"paths: {name!r} pads the map to whole windows of {window}; expected windows of at most {MAX_WINDOW}")
    return PathSpec(match["kind"] == "v", window, match["flip"] is not None)


@functools.lru_cache(maxsize=512)
def path_table(name: str, height: int, width: int) -> np.ndarray:
    """The index table of one path over a `height` x `width` map: int64 (L',), read-only, -1 where the step is padding."""
    spec = parse_path(name)
    raster = np.arange(height * width, dtype=np.int64).reshape(height, width)
    if spec.column:
        table = raster.T.reshape(-1)
    elif spec.window:
        k = spec.window
        rows, columns = -(-height // k), -(-width // k)
        padded = np.full((rows * k, columns * k), -1, dtype=np.int64)
        padded[:height, :width] = raster
        table = padded.reshape(rows, k, columns, k).transpose(0, 2, 1, 3).reshape(-1)
    else:
        table = raster.reshape(-1)
    table = np.ascontiguousarray(table[::-1] if spec.flip else table)
    table.flags.writeable = False
    return table


def path_length(name: str, height: int, width: int) -> int:
    """Steps of one path, window padding included; arithmetic alone, so that the sizes may be symbolic."""
    k = max(parse_path(name).window, 1)
    return ((height + k - 1) // k) * ((width + k - 1) // k) * k * k


@dataclass(frozen=True)
class ScanPaths:
    """K scan paths over one `size` = (H, W) map.

    Args:
        names: K path names; a name may repeat.
        size: height and width of the map, both at least 1.
        token_at: insert one extra token (a class token) as step `token_at` of every sequence. The map is then given flat,
            `(batch, H * W + 1, C)`, with that token at the same index of the raster order (LocalMamba's middle class token).

    Raises:
        ValueError: an unknown name, no name at all, an empty map, or a `token_at` outside 0..H*W.
    """

    names: tuple[str, ...]
    size: tuple[int, int]
    token_at: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", check_names(self.names))
        object.__setattr__(self, "size", check_size("paths", self.size))
        if self.token_at is not None:
            positions = self.size[0] * self.size[1]
            if not _is_integer(self.token_at) or not 0 <= self.token_at <= positions:
                raise ValueError(f"paths: token_at is {self.token_at!r}, expected None or an index from 0 to {positions} (H * W)")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def inserted(self) -> int:
        """1 with an inserted token, else 0."""
        return int(self.token_at is not None)

    @property
    def positions(self) -> int:
        """Positions of the raster order: H * W, and one more with an inserted token."""
        return self.size[0] * self.size[1] + self.inserted

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each path, window padding included."""
        return tuple(path_length(name, *self.size) + self.inserted for name in self.names)

    @property
    def length(self) -> int:
        """L': steps of the longest path. Shorter ones are padded at their end, which a causal scan does not notice."""
        return max(self.lengths)

    @property
    def table(self) -> np.ndarray:
        """int64 (K, L'): the raster position visited at each step, -1 at a padded step. Read-only."""
        return _tables(self)[0]

    @property
    def inverse(self) -> np.ndarray:
        """int64 (K, positions): the step at which each raster position is visited. Read-only."""
        return _tables(self)[1]


@functools.lru_cache(maxsize=512)
def _tables(paths: ScanPaths) -> tuple[np.ndarray, np.ndarray]:
    table = np.full((len(paths), paths.length), -1, dtype=np.int64)
    inverse = np.empty((len(paths), paths.positions), dtype=np.int64)
    for k, name in enumerate(paths.names):
        steps = path_table(name, *paths.size)
        if paths.token_at is not None:
            steps = np.insert(steps + (steps >= paths.token_at), paths.token_at, paths.token_at)
        table[k, : len(steps)] = steps
        visited = np.flatnonzero(steps >= 0)
        inverse[k, steps[visited]] = visited
    table.flags.writeable = inverse.flags.writeable = False
    return table, inverse


def check_names(names: object) -> tuple[str, ...]:
    """The path names as a tuple; a single string, an empty sequence or an unknown name is a ValueError."""
    if isinstance(names, str) or not isinstance(names, (tuple, list)):
        raise ValueError(f"paths: expected a tuple of path names or a ScanPaths, got {names!r}")
    if not names:
        raise ValueError("paths: got no path; expected at least one name, for example ('h', 'v', 'h_flip', 'v_flip')")
    for name in names:
        parse_path(name)
    return tuple(names)


def check_size(argument: str, size: object) -> tuple[int, int]:
    """(H, W) as a tuple; anything but two positive integers is a ValueError that names `argument`."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(_is_integer(side) for side in size):
        raise ValueError(f"{argument}: expected a map size (H, W) of two integers, got {size!r}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{argument}: a map of {size[0]} x {size[1]} has no position; expected height and width of at least 1")
    return tuple(side.item() if isinstance(side, np.integer) else side for side in size)


def _is_integer(value: object) -> bool:
    """Also numpy's and symbolic integers, but no bool."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)
