"""visionssm: vision state-space backbones on one 2-D selective-scan operator.

Importing the package registers every model with timm. It prints nothing and loads no kernel.
"""

from . import models as models
from ._version import __version__
from .models import load_checkpoint
from .recipes import config_path

__all__ = ["__version__", "config_path", "load_checkpoint"]
