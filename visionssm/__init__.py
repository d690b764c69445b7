"""visionssm: vision state-space backbones on one 2-D selective-scan operator.

Importing the package registers every model with timm. It prints nothing and loads no kernel.
"""

from . import models as models
from ._version import __version__

__all__ = ["__version__"]
