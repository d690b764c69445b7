"""The model families; importing this package registers them with timm."""

from .vmamba import VMamba as VMamba
