"""`visionssm download`, `convert` and `verify`: published checkpoints and files of one's own."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from torch import Tensor, nn

from visionssm import load_checkpoint
from visionssm.errors import UserError, printable
from visionssm.weights import download, find, read_checkpoint, select_weights, sha256_of
from visionssm.weights.convert import is_dense, save_safetensors, to_own_names
from visionssm.weights.table import published_entry

from .classifier import Classifier
from .images import open_image
from .models import check_model, parameters

FORMATS = ("original", "safetensors")


def download_to(name: str, folder: Path | None, form: str) -> Path:
    """Download a published checkpoint.

    Args:
        name: `model.tag`, or a model's name.
        folder: where to put it; None leaves it in the cache, or takes the working folder where it is converted.
        form: "original", or "safetensors" under our names.

    Returns:
        The file.

    Raises:
        UserError: an unknown name, a failed download, a file that is refused or cannot be written.
    """
    row = find(name)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--to: {folder}: no such folder")
    file = download(name)
    if form == "safetensors":
        out = (folder or Path()) / f"{row.name}.safetensors"
        convert_file(file, row.model, out, row.entry)
        return out
    if folder is None:
        return file
    out = folder / f"{row.name}{Path(row.url).suffix}"
    part = out.with_name(f".{out.name}.part")
    shutil.copy(file, part)
    part.replace(out)
    return out


def convert_file(file: Path, name: str, out: Path, entry: str | None = None) -> str:
    """Write a checkpoint under our names as safetensors.

    Args:
        file: a published checkpoint, also a detector's or segmentor's, or one of ours.
        name: the model's name.
        out: the file to write.
        entry: the entry of the file that holds the weights; None takes "model" or "state_dict".

    Returns:
        One line that says what was written.

    Raises:
        UserError: a file that is refused or of another model, or `out` cannot be written.
    """
    check_model(name)
    if out.resolve() == file.resolve():
        raise UserError(f"--out: {out} is the file to convert")
    weights = _weights(file, name, entry, read_checkpoint(file))
    own = to_own_names(weights, _model_for(weights, name), str(file))
    save_safetensors(own, out, {"architecture": name.split(".")[0], "source": file.name, "source_sha256": sha256_of(file)})
    what = "with the detector's or segmentor's other parts, " if is_dense(weights) else ""
    return f"{out}: {len(own)} tensors, {what}{out.stat().st_size / 1e6:.1f} MB{_resized(weights, own)}"


def verify_file(file: Path, name: str, image: Path | None = None, entry: str | None = None) -> Iterator[str]:
    """Lines that say what a checkpoint holds and that it works in a model.

    Args:
        file: as `convert_file`.
        name: as `convert_file`.
        image: an image to classify; None takes a plain test pattern.
        entry: as `convert_file`.

    Raises:
        UserError: as `convert_file`, an unreadable image, or an output that is not finite.
    """
    check_model(name)
    content = read_checkpoint(file)
    weights = _weights(file, name, entry, content)
    yield f"{file}: {file.stat().st_size:,} bytes, sha256 {sha256_of(file)}"
    entries = [printable(str(key)) for key, value in content.items() if not isinstance(value, Tensor)]
    yield f"{len(weights)} tensors of {_dtypes(weights)}" + (f"; the file holds {', '.join(entries)}" if entries else "")
    model = _model_for(weights, name)
    own = to_own_names(weights, model, str(file))
    load_checkpoint(model, own)
    loaded = f"all {len(model.state_dict())} tensors loaded, {parameters(model):,} parameters, none missing"
    yield f"{name}: {loaded}{_resized(weights, own)}"
    if is_dense(weights):
        yield _rest(own)
        return
    classifier = Classifier(model, source=str(file), device="cpu")
    channels, height, width = classifier.data_config["input_size"]
    mode = "RGB" if channels == 3 else "L"
    picture = open_image(image, channels) if image else Image.linear_gradient("L").resize((width, height)).convert(mode)
    yield f"{image or 'a plain gradient from black to white'}, the likeliest of {model.num_classes} classes:"
    yield from (f"  {score:6.1%}  {label}" for label, score in classifier.likeliest(picture))


def _weights(file: Path, name: str, entry: str | None, content: dict[str, Any]) -> dict[str, Tensor]:
    """From the entry that the user, or the table of published files, names."""
    known = find(name).entry if "." in name else published_entry(file)
    return select_weights(content, entry or known, str(file))


def _model_for(weights: dict[str, Tensor], name: str) -> nn.Module:
    """The model with as many classes as the weights have."""
    biases = [value for key, value in weights.items() if key.endswith(("classifier.head.bias", "head.fc.bias", "head.bias"))]
    classes = 0 if is_dense(weights) or not biases else biases[0].numel()
    return timm.create_model(name, num_classes=classes)


def _resized(weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """A remark where the positions in the file are of another grid: another image size, or another model."""
    theirs, ours = (
        next((value.shape[1] for key, value in names.items() if key.endswith("pos_embed") and value.dim() == 3), 0)
        for names in (weights, own)
    )
    return "" if theirs == ours else f"; its {theirs} positions were resized to {ours}: is it of this model?"


def _rest(own: dict[str, Tensor]) -> str:
    """What of a detector's or segmentor's file is not the backbone's."""
    parts = Counter("output norms" if ".outnorm" in key else key.split(".")[0] for key in own)
    counted = [f"{count} of {printable(part)}" for part, count in parts.items() if part != "backbone"]
    return f"of the file's other tensors only the last output norm was loaded: {', '.join(counted)}"


def _dtypes(weights: dict[str, Tensor]) -> str:
    return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()}))
