"""`visionssm classify`: from a model's name or a checkpoint to the classes of an image."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import (
    CustomDatasetInfo,
    DatasetInfoLabelMapper,
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from timm.models import is_model, list_models
from torch import nn

from visionssm.errors import UserError, did_you_mean, first_line, key_mismatch
from visionssm.weights import read_checkpoint

from .images import open_image
from .models import check_model, zoo
from .run_config import read_config

_PREPROCESSING = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
_LOAD_ERRORS = (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Prediction:
    """An image as the model's user sees it, and its likeliest classes with their probabilities, the likeliest first."""

    path: Path
    image: Image.Image
    classes: list[tuple[str, float]]


class Classifier:
    """A model that has weights, with its preprocessing and class names.

    Args:
        model: the model; its `pretrained_cfg` states the preprocessing and, where known, `label_names`.
        source: where the weights come from, for `description`.
        device: "cpu" or "cuda".
    """

    def __init__(self, model: nn.Module, source: str, device: str) -> None:
        if not model.num_classes:
            raise UserError(f"{source}: the model has no classifier")
        self.model = model.eval().to(device)
        self.device = device
        self.source = source
        self.name_of = _label_mapper(model, source)
        self.data_config = resolve_model_data_config(model)
        self.transform = create_transform(**self.data_config, is_training=False)

    @property
    def description(self) -> str:
        """Model, weights, number of classes, input size and device in one line."""
        cfg = self.model.pretrained_cfg
        size = " x ".join(map(str, self.data_config["input_size"][1:]))
        return f"{cfg['architecture']} from {self.source}: {self.model.num_classes} classes, {size} pixels, on {self.device}"

    def classify(self, path: Path, top: int = 5) -> Prediction:
        """The likeliest classes of an image file; all of them where the model has fewer than `top`.

        Raises:
            UserError: a file that is not a readable image.
        """
        image = open_image(path, channels=self.data_config["input_size"][0])
        return Prediction(path, image, self.likeliest(image, top))

    @torch.inference_mode()
    def likeliest(self, image: Image.Image, top: int = 5) -> list[tuple[str, float]]:
        """The names and probabilities of the likeliest classes, at most `top`, the likeliest first.

        Raises:
            UserError: the model's output is not finite.
        """
        logits = self.model(self.transform(image)[None].to(self.device))[0].float()
        if not logits.isfinite().all():
            raise UserError(f"{self.source}: the model's output is not finite; its weights may be broken")
        scores, indices = logits.softmax(0).topk(min(top, len(logits)))
        return [(self.name_of(i), score) for i, score in zip(indices.tolist(), scores.tolist(), strict=True)]


def load_classifier(name_or_checkpoint: str, device: str | None = None) -> Classifier:
    """A classifier from a model's name (with published weights) or from a checkpoint.

    Args:
        name_or_checkpoint: a name of the zoo; a folder that timm's `save_for_hf` wrote; a work directory of a training run, of
            which the file written last counts; a `.pth` file of a training run.
        device: "cpu" or "cuda"; None is cuda where there is a GPU.

    Raises:
        UserError: neither a name nor a checkpoint, no weights of that name, a broken or unfit checkpoint, no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; visionssm env says more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(name_or_checkpoint.removeprefix("local-dir:"))
    if is_model(name_or_checkpoint.split(".")[0]):
        model = _load_published(name_or_checkpoint)
    elif path.is_dir():
        path = _newest_in(path)
        model = _load_folder(path) if path.is_dir() else _load_run(path)
    elif path.is_file():
        model = _load_run(path)
    else:
        raise UserError(f"{name_or_checkpoint}: neither a file or folder nor a model{did_you_mean(name_or_checkpoint, zoo())}")
    return Classifier(model, source=str(path), device=device)


def _load_published(name: str) -> nn.Module:
    check_model(name)
    if not timm.get_pretrained_cfg(name).has_weights:
        raise UserError(
            f"{name}: no weights are published in this version; give a checkpoint instead: "
            "a folder or .pth file that training wrote, or a folder by timm's save_for_hf"
        )
    try:
        return timm.create_model(name, pretrained=True)
    except UserError:
        raise
    except _LOAD_ERRORS as error:
        raise UserError(f"{name}: its weights cannot be loaded: {first_line(error)}") from error


def _newest_in(folder: Path) -> Path:
    """The folder itself if it is timm's, else what a training run wrote last into it: its folder for timm or a checkpoint."""
    if (folder / "config.json").is_file():
        return folder
    exports = folder.glob("timm/model.safetensors")
    candidates = {path.stat().st_mtime_ns: path for path in (*folder.glob("*.pth"), *exports)}
    if not candidates:
        raise UserError(
            f"{folder}: holds neither a config.json, as timm's save_for_hf writes it, nor a .pth file of a training run"
        )
    newest = candidates[max(candidates)]
    return newest.parent if newest.suffix == ".safetensors" else newest


def _load_folder(folder: Path) -> nn.Module:
    """From `config.json` and weights, as timm's `save_for_hf` writes them."""
    config = folder / "config.json"
    try:
        architecture = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{config}: not the JSON that timm's save_for_hf writes: {type(error).__name__} {first_line(error)}"
        ) from error
    _check_architecture(config, architecture)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except _LOAD_ERRORS as error:
        reason = key_mismatch(error) if isinstance(error, RuntimeError) else first_line(error)
        raise UserError(f"{folder}: cannot be loaded as {architecture}: {reason}") from error
    stated = model.pretrained_cfg["num_classes"]
    if model.num_classes != stated:  # timm has left the weights of the classifier out
        raise UserError(f"{config}: states {stated} classes, and {model.num_classes} in model_args")
    return model


def _load_run(path: Path) -> nn.Module:
    """From a checkpoint of a training run: its config names the model and the preprocessing, its meta data the classes."""
    content = read_checkpoint(path)
    try:
        state_dict, meta = content["state_dict"], content["meta"]
        config = read_config(meta["cfg"], "model", "val_dataloader", "train_dataloader")
        arguments = dict(config["model"]["backbone"])
        architecture = arguments.pop("model_name")
        dataset = (config.get("val_dataloader") or config.get("train_dataloader") or {}).get("dataset", {})
        overlay = _preprocessing(config["model"], dataset)
        classes = meta.get("dataset_meta", {}).get("classes")
        weights = {name.removeprefix("backbone."): value for name, value in state_dict.items() if name.startswith("backbone.")}
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{path}: does not say which model it is of; expected a checkpoint that training wrote, with state_dict and meta"
        ) from error
    if "type" in arguments:  # "visionssm.Backbone"; a classifier's backbone is timm's
        kind = config["model"].get("type")
        raise UserError(f"{path}: is of OpenMMLab's {kind}; expected a checkpoint of a classifier that visionssm train wrote")
    _check_architecture(path, architecture)
    if classes:
        overlay["label_names"] = list(classes)
    for source in ("pretrained", "checkpoint_path"):  # of the weights that the run started from
        arguments.pop(source, None)
    try:
        model = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **arguments)
        model.load_state_dict(weights)
    except _LOAD_ERRORS as error:
        reason = key_mismatch(error) if isinstance(error, RuntimeError) else first_line(error)
        raise UserError(f"{path}: cannot be loaded as {architecture}: {reason}") from error
    return model


def _preprocessing(model: Mapping[str, Any], dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's validation did to an image, in timm's terms."""
    known = dict(dataset.get("transform") or {})
    normalisation = model.get("data_preprocessor") or {}
    if normalisation.get("type") == "visionssm.ImagePreprocessor":
        known.update(normalisation)
    overlay = {key: known[key] for key in _PREPROCESSING if key in known}
    size = dataset.get("input_size")
    if size:
        overlay["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size)
    return overlay


def _check_architecture(path: Path, architecture: Any) -> None:
    if not isinstance(architecture, str) or not is_model(architecture):
        raise UserError(f"{path}: names an unknown model {architecture!r}{did_you_mean(str(architecture), list_models())}")


def _label_mapper(model: nn.Module, source: str) -> DatasetInfoLabelMapper:
    """From class index to class name: what the checkpoint says, ImageNet's names, or `class 3`."""
    cfg = model.pretrained_cfg
    try:
        if cfg.get("label_names"):
            info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
        else:
            subset = infer_imagenet_subset(model)
            info = ImageNetInfo(subset) if subset else CustomDatasetInfo(["class 0"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: label_names: {first_line(error)}") from error
    mapper = DatasetInfoLabelMapper(info, fallback_format="class {index}")
    extra = mapper.coverage(model.num_classes).extra
    if extra:
        raise UserError(f"{source}: label_names: {extra} more names than the model's {model.num_classes} classes")
    return mapper
