"""The part of the packaging that needs code: which folder holds which import name.

`ops/` is installed as `visionssm.ops` and `configs/` as `visionssm.configs`; a bare find_packages() would ship them as
top-level packages. Everything static stands in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = {"visionssm": "visionssm", "visionssm.ops": "ops", "visionssm.configs": "configs"}


def packages() -> list[str]:
    """Every import name that the wheel holds; a set, since `make dev` may have linked visionssm/ops to ops/."""
    names = set(find_packages(include=["visionssm", "visionssm.*"]))
    for name, folder in FOLDERS.items():
        if name != folder:
            names |= {name, *(f"{name}.{sub}" for sub in find_packages(folder))}
    return sorted(names)


setup(packages=packages(), package_dir=FOLDERS)
