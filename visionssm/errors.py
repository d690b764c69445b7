"""Errors that are the user's to correct: the command line prints them as one line, without a traceback."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A wrong name, file or option from outside; the message is one line that says what to change."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message, `; did you mean a, b?`, or nothing when no known name is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(near)}?" if near else ""


def shortened(names: Iterable[str], shown: int = 5, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = len(names) - shown
    return separator.join([*map(printable, names[:shown]), *([f"and {rest} more"] if rest > 0 else [])])


def printable(text: str) -> str:
    """Text of a stranger's file without what would steer the terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for an error of one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def key_mismatch(error: RuntimeError) -> str:
    """In one line what `load_state_dict` complains of: missing, unexpected and misshapen parameters, a few of each."""
    text = str(error)
    parts = []
    for kind in ("Missing", "Unexpected"):
        listing = re.search(rf"{kind} key\(s\) in state_dict: (.*)", text)
        if listing:
            names = re.findall(r'"([^"]+)"', listing[1])
            parts.append(f"{kind.lower()} {shortened(names, 3)}")
    shapes = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", text)
    if shapes:
        parts.append(f"of other shapes {shortened([f'{name} {theirs} for {ours}' for name, theirs, ours in shapes], 3)}")
    return "; ".join(parts) or first_line(error)
