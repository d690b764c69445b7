"""Errors that are the user's to correct: the launcher prints them as one line, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A wrong value in a config, on the command line or in the data that they name."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message, `; did you mean a, b?`, or nothing when no known name is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(near)}?" if near else ""
