"""The mmengine registries of scope `visionssm`.

mmengine imports this module by itself when it meets a type such as `visionssm.ImageClassifier`, from whichever registry the
lookup starts, so a config of any OpenMMLab package needs no `custom_imports`. What is registered lies in the modules that
`locations` names; they are imported at the first lookup.
"""

from importlib.metadata import PackageNotFoundError, distribution

ENGINES = ("mmengine", "mmengine-lite", "onedl-mmengine")


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def check_engine() -> None:
    """Refuse an environment without mmengine, or with two distributions that overwrite each other's files.

    Raises:
        ImportError: none of `mmengine`, `mmengine-lite`, `onedl-mmengine` is installed, or more than one.
    """
    found = [name for name in ENGINES if _installed(name)]
    if not found:
        raise ImportError("training needs mmengine: pip install 'visionssm[train]'")
    if len(found) > 1:
        names = " ".join(found)
        raise ImportError(f"{' and '.join(found)} share one import folder: pip uninstall {names}, then pip install onedl-mmengine")


check_engine()

from mmengine import registry as root  # noqa: E402
from mmengine.config.utils import MODULE2PACKAGE  # noqa: E402
from mmengine.registry import Registry  # noqa: E402

# The maintained distribution of mmseg has another name, by which mmengine does not find the configs of `mmseg::`.
MODULE2PACKAGE["mmseg"] = "mmseg"

SCOPE = "visionssm"
LOCATIONS = ["visionssm.engine", "visionssm.openmmlab"]

MODELS = Registry("model", parent=root.MODELS, scope=SCOPE, locations=LOCATIONS)
DATASETS = Registry("dataset", parent=root.DATASETS, scope=SCOPE, locations=LOCATIONS)
FUNCTIONS = Registry("function", parent=root.FUNCTIONS, scope=SCOPE, locations=LOCATIONS)
DATA_SAMPLERS = Registry("data sampler", parent=root.DATA_SAMPLERS, scope=SCOPE, locations=LOCATIONS)
METRICS = Registry("metric", parent=root.METRICS, scope=SCOPE, locations=LOCATIONS)
HOOKS = Registry("hook", parent=root.HOOKS, scope=SCOPE, locations=LOCATIONS)
OPTIMIZERS = Registry("optimizer", parent=root.OPTIMIZERS, scope=SCOPE, locations=LOCATIONS)
OPTIM_WRAPPERS = Registry("optimizer wrapper", parent=root.OPTIM_WRAPPERS, scope=SCOPE, locations=LOCATIONS)
STRATEGIES = Registry("strategy", parent=root.STRATEGIES, scope=SCOPE, locations=LOCATIONS)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=root.OPTIM_WRAPPER_CONSTRUCTORS, scope=SCOPE, locations=LOCATIONS
)
