"""mmengine's Runner with checkpoints that are never half written, never half loaded, and a quiet terminal."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.runner import Runner as MMEngineRunner

from .errors import ConfigError

_KEYS_SHOWN = 5


class Runner(MMEngineRunner):
    """The Runner that every entry point uses; arguments are mmengine's."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The log file takes every line, the terminal only warnings and errors that concern the user."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(max(handler.level, logging.WARNING))
                handler.addFilter(lambda record: "deprecated" not in record.getMessage())
        return logger

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        partial = Path(out_dir) / f"{filename}.partial"
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(Path(out_dir) / filename)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, filename: str, map_location: str | Callable = "cpu", strict: bool = True, **kwargs: Any) -> dict:
        """Load a checkpoint that fits the model key by key.

        Raises:
            ConfigError: no such file, or a checkpoint of another model.
        """
        if not Path(filename).is_file():
            raise ConfigError(f"checkpoint: no such file: {filename}")
        try:
            return super().load_checkpoint(filename, map_location, strict, **kwargs)
        except RuntimeError as error:
            # mmengine's message: a headline, then all names of a kind in one line, all shapes that differ in one line each
            lines = [line.strip() for line in str(error).splitlines() if line.strip()][1:]
            reasons = _shortened([_shortened(line.split(", "), ", ") for line in lines], "; ")
            raise ConfigError(f"checkpoint: {filename} is not of this model: {reasons}") from error


def _shortened(parts: list[str], separator: str) -> str:
    rest = len(parts) - _KEYS_SHOWN
    return separator.join([*parts[:_KEYS_SHOWN], *([f"and {rest} more"] if rest > 0 else [])])
