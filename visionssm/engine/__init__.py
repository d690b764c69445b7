"""What a classification config names: model, data, metric, hooks, optimizer; needs mmengine (`pip install visionssm[train]`)."""

from .classifier import ImageClassifier, ImagePreprocessor
from .contact_sheet import ContactSheetHook
from .data import Digits, ImageFolder
from .hooks import ClassCountHook, ExportHook, RandomnessHook, UnreadableImagesHook
from .metrics import TopK
from .optim import OptimWrapperConstructor
from .progress import ProgressHook
from .runner import Runner

__all__ = [
    "ClassCountHook",
    "ContactSheetHook",
    "Digits",
    "ExportHook",
    "ImageClassifier",
    "ImageFolder",
    "ImagePreprocessor",
    "OptimWrapperConstructor",
    "ProgressHook",
    "RandomnessHook",
    "Runner",
    "TopK",
    "UnreadableImagesHook",
]
