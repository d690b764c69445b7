"""The model families; importing this package registers them with timm."""

from ._checkpoint import load_checkpoint as load_checkpoint
from .local_vim import LocalVim as LocalVim
from .local_vmamba import LocalVMamba as LocalVMamba
from .vim import VisionMamba as VisionMamba
from .vmamba import VMamba as VMamba
