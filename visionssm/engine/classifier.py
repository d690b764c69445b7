"""A timm model as an mmengine model: loss, predictions, normalisation on the device."""

import re
import sys
from collections.abc import Mapping, Sequence
from inspect import isclass, signature
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from timm.models import is_model, list_models, model_entrypoint
from torch import Tensor, nn

from visionssm.errors import UserError, did_you_mean
from visionssm.registry import MODELS


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Moves a batch of uint8 images to the device and normalises it there: a quarter of the bytes travel.

    Args:
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(non_blocking=True)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Images `(batch, C, H, W)` uint8 to float32 of mean 0 and deviation 1; labels `(batch,)` as they are."""
        images, labels = self.cast_data((data["images"], data["labels"]))
        return {"images": (images.float() - self.mean) / self.std, "labels": labels}


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """An image classifier over `timm.create_model`.

    Args:
        backbone: `model_name` and any further argument of `timm.create_model`.
        label_smoothing: share of the target that is spread evenly over the classes.
        data_preprocessor: by default an ImagePreprocessor with the mean and std of the backbone's `pretrained_cfg`.

    Raises:
        UserError: a model name or an argument that timm does not know, with the nearest that it does.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        label_smoothing: float = 0.0,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        model = create_backbone(**backbone)
        if data_preprocessor is None:
            cfg = model.pretrained_cfg
            data_preprocessor = ImagePreprocessor(mean=cfg["mean"], std=cfg["std"])
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = model
        self.label_smoothing = label_smoothing

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.backbone.num_classes

    def init_weights(self) -> None:
        """Do nothing: timm's constructor has initialised, or loaded, the backbone."""
        self._is_init = True

    def forward(
        self, images: Tensor, labels: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict]:
        """Run the backbone.

        Args:
            images: `(batch, C, H, W)`, normalised.
            labels: `(batch,)` class indices; needed by mode "loss" alone.
            mode: "tensor", "loss" or "predict".

        Returns:
            "tensor": logits `(batch, num_classes)`; "loss": `loss` and the batch's `accuracy` in percent; "predict": one
            dict per image with `scores`, the `(num_classes,)` softmax.

        Raises:
            ValueError: an unknown mode.
        """
        logits = self.backbone(images)
        if mode == "tensor":
            return logits
        if mode == "loss":
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            return {"loss": loss, "accuracy": 100 * (logits.argmax(1) == labels).float().mean()}
        if mode == "predict":
            return [{"scores": scores} for scores in logits.float().softmax(1)]
        raise ValueError(f"mode: got {mode!r}, expected 'tensor', 'loss' or 'predict'")


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
