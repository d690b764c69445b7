"""What a classification config names: model, data, metric, hooks, optimizer; needs mmengine (`pip install visionssm[train]`)."""

from .augment import BatchAugmentation
from .classifier import ImageClassifier, ImagePreprocessor
from .contact_sheet import ContactSheetHook
from .data import CachedImages, Digits, HubImages, ImageFolder
from .hooks import ClassCheckHook, DataCheckHook, EMAHook, ExportHook, RandomnessHook, RuntimeInfoHook, UnreadableImagesHook
from .learning_curve import LearningCurveHook
from .metrics import TopK
from .muon import Muon
from .optim import OptimWrapper, OptimWrapperConstructor
from .progress import ProgressHook
from .runner import Runner
from .samplers import RepeatedAugmentation
from .search import DirectionSearch, DirectionsHook
from .sharded import FlexibleRunner, ShardedStrategy
from .stream import ImageStream

__all__ = [
    "BatchAugmentation",
    "CachedImages",
    "ClassCheckHook",
    "ContactSheetHook",
    "DataCheckHook",
    "Digits",
    "DirectionSearch",
    "DirectionsHook",
    "EMAHook",
    "ExportHook",
    "FlexibleRunner",
    "HubImages",
    "ImageClassifier",
    "ImageFolder",
    "ImagePreprocessor",
    "ImageStream",
    "LearningCurveHook",
    "Muon",
    "OptimWrapper",
    "OptimWrapperConstructor",
    "ProgressHook",
    "RandomnessHook",
    "RepeatedAugmentation",
    "Runner",
    "RuntimeInfoHook",
    "ShardedStrategy",
    "TopK",
    "UnreadableImagesHook",
]
