"""Where the training configs lie that the package ships."""

from difflib import get_close_matches
from pathlib import Path

from visionssm import configs
from visionssm.errors import UserError

FOLDER = Path(configs.__file__).parent


def config_path(name: str) -> Path:
    """The file of a training config.

    Args:
        name: a path, or the name of a config that the package ships, with or without its folder and `.py`, such as
            `classification/vmamba-tiny-s1l8_8xb128-300e_in1k`.

    Raises:
        UserError: no such file; names the nearest ones.
    """
    for path in (Path(name), FOLDER / name, FOLDER / f"{name}.py"):
        if path.is_file():
            return path
    stem = Path(name).name.removesuffix(".py")
    shipped = {path.stem: path for path in recipes()}
    if Path(name).name == name and stem in shipped:
        return shipped[stem]
    known = {path.stem: str(path.relative_to(FOLDER)) for path in shipped.values()}
    known |= {path.stem: str(path) for path in Path(name).parent.glob("*.py")}
    near = [known[match] for match in get_close_matches(stem, known)]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise UserError(f"config file not found: {name}{hint}")


def recipes() -> list[Path]:
    """The config files that the package ships, without the `_base_` ones."""
    return sorted(path for path in FOLDER.glob("*/*.py") if not path.parent.name.startswith("_") and path.stem != "__init__")
