"""A timm model as an mmengine model: loss, predictions, and what is done to a batch on the device."""

import re
import sys
from collections.abc import Mapping, Sequence
from inspect import isclass, signature
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models import is_model, list_models, model_entrypoint
from torch import Tensor, nn

from visionssm.errors import UserError, did_you_mean
from visionssm.models import load_checkpoint
from visionssm.registry import MODELS
from visionssm.weights import load_weights

from .augment import BatchAugmentation
from .device_decode import decode_batch


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Moves a batch of uint8 images to the device and normalises it there: a quarter of the bytes travel.

    Images that are still encoded (a data set's `decode="device"`) are decoded there first. In training it augments the batch before
    it normalises, and erases and mixes after it, also on the device.

    Args:
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        random_erasing: arguments of timm's `RandomErasing`: `probability`, `mode`, `max_count`; None for none.
        mixup: timm's Mixup; None for none.
        augmentation: what is done to the uint8 images; None for nothing.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        random_erasing: Mapping[str, Any] | None = None,
        mixup: Mixup | None = None,
        augmentation: BatchAugmentation | None = None,
    ) -> None:
        super().__init__(non_blocking=True)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.random_erasing = RandomErasing(**random_erasing) if random_erasing else None
        self.mixup = mixup
        self.augmentation = augmentation

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Images `(batch, C, H, W)` uint8 to float32 of mean 0 and deviation 1.

        Labels `(batch,)` stay as they are, unless they are mixed in training, to `(batch, num_classes)` of sum 1.
        """
        images, labels = decode_batch(data, self.device) if "encoded" in data else (data["images"], data["labels"])
        images, labels = self.cast_data((images, labels))
        if training and self.augmentation:
            images = self.augmentation(images)
        images = (images.float() - self.mean) / self.std
        if training and self.random_erasing:
            self.random_erasing.device = images.device
            images = self.random_erasing(images)
        if training and self.mixup:
            images, labels = self.mixup(images, labels)
        return {"images": images, "labels": labels}


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """An image classifier over `timm.create_model`.

    Args:
        backbone: `model_name` and any further argument of `timm.create_model`.
        label_smoothing: share of the target that is spread evenly over the classes.
        mixup: arguments of timm's `Mixup`, such as `mixup_alpha`, `cutmix_alpha`, `prob`, `switch_prob`, `mode`; None for none.
        random_erasing: arguments of timm's `RandomErasing`, applied to normalised images; None for none.
        batch_augmentation: arguments of `BatchAugmentation`, which works on the device; None to leave it to the data set.
        initial_weights: where training starts: a checkpoint file, or the name of a published one as in `visionssm download`; also
            of a model whose weights load into this one, such as a Vim of stride 16 for one of stride 8. None for fresh weights.
        flip_test: predict the mean of the scores of an image and of its mirror image.
        data_preprocessor: by default an ImagePreprocessor with the mean and std of the backbone's `pretrained_cfg`.

    Raises:
        UserError: a model name or an argument that timm does not know, with the nearest that it does.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        random_erasing: Mapping[str, Any] | None = None,
        batch_augmentation: Mapping[str, Any] | None = None,
        initial_weights: str | None = None,
        flip_test: bool = False,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        model = create_backbone(**backbone)
        for argument, given, cls in (
            ("mixup", mixup, Mixup),
            ("random_erasing", random_erasing, RandomErasing),
            ("batch_augmentation", batch_augmentation, BatchAugmentation),
        ):
            _check_names(f"model.{argument}", given, cls)
        if data_preprocessor is None:
            cfg = model.pretrained_cfg
            mixing = Mixup(num_classes=model.num_classes, label_smoothing=label_smoothing, **mixup) if mixup else None
            augmentation = BatchAugmentation(**batch_augmentation) if batch_augmentation else None
            data_preprocessor = ImagePreprocessor(cfg["mean"], cfg["std"], random_erasing, mixing, augmentation)
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = model
        self.label_smoothing = label_smoothing
        self.initial_weights = initial_weights
        self.flip_test = flip_test

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.backbone.num_classes

    def init_weights(self) -> None:
        """Load `initial_weights`, if there are any; timm's constructor has initialised, or loaded, the backbone.

        Raises:
            UserError: no such checkpoint, or one of another model.
        """
        self._is_init = True
        if self.initial_weights is not None:
            is_file = Path(self.initial_weights).is_file()
            load_checkpoint(self.backbone, self.initial_weights if is_file else load_weights(self.initial_weights))

    def forward(
        self, images: Tensor, labels: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict]:
        """Run the backbone.

        Args:
            images: `(batch, C, H, W)`, normalised.
            labels: class indices `(batch,)`, or shares of the classes `(batch, num_classes)`; needed by mode "loss" alone.
            mode: "tensor", "loss" or "predict".

        Returns:
            "tensor": logits `(batch, num_classes)`; "loss": `loss` and the batch's `accuracy` in percent, of mixed images in
            naming the class with the largest share; "predict": one dict per image with `scores`, the `(num_classes,)` softmax.

        Raises:
            ValueError: an unknown mode.
        """
        logits = self.backbone(images)
        if mode == "tensor":
            return logits
        if mode == "loss":
            mixed = labels.ndim == 2  # then smoothed already
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.0 if mixed else self.label_smoothing)
            target = labels.argmax(1) if mixed else labels
            return {"loss": loss, "accuracy": 100 * (logits.argmax(1) == target).float().mean()}
        if mode == "predict":
            scores = logits.float().softmax(1)
            if self.flip_test:
                scores = (scores + self.backbone(images.flip(3)).float().softmax(1)) / 2
            return [{"scores": row} for row in scores]
        raise ValueError(f"mode: got {mode!r}, expected 'tensor', 'loss' or 'predict'")


def _check_names(path: str, arguments: Mapping[str, Any] | None, cls: type) -> None:
    for name in arguments or {}:
        if name not in (known := signature(cls).parameters):
            package = cls.__module__.partition(".")[0]
            raise UserError(f"{path}.{name}: {package}'s {cls.__name__} has no such argument{did_you_mean(name, known)}")


def create_backbone(model_name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, whose complaints about unknown names come back with the nearest known ones.

    Args:
        model_name: a registered model, or `hf-hub:...`, `local-dir:...`.
        **kwargs: arguments of `timm.create_model` and of the model's class.

    Raises:
        UserError: an unknown model name or argument.
    """
    is_registry_name = ":" not in model_name
    if is_registry_name and not is_model(model_name):
        raise UserError(f"model_name: unknown model {model_name!r}{did_you_mean(model_name.split('.')[0], list_models())}")
    try:
        return timm.create_model(model_name, **kwargs)
    except TypeError as error:
        unknown = re.search(r"(?:(\w+)\.)?\w+\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not (unknown and is_registry_name):
            raise
        class_name, argument = unknown.groups()
        near = did_you_mean(argument, _arguments(class_name, model_entrypoint(model_name).__module__))
        raise UserError(f"model.backbone.{argument}: {model_name} has no such argument{near}") from error


def _arguments(class_name: str | None, module: str) -> list[str]:
    """The arguments of `timm.create_model` and of a class that a model file defines."""
    functions = [timm.create_model]
    cls = vars(sys.modules[module]).get(class_name or "")
    if isclass(cls):
        functions.append(cls)
    return [name for function in functions for name in signature(function).parameters]
