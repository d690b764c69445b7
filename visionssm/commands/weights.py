"""`visionssm download`, `convert` and `verify`: published checkpoints and files of one's own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import timm
from PIL import Image
from torch import Tensor, nn

from visionssm import load_checkpoint
from visionssm.errors import UserError
from visionssm.weights import download, find, read_checkpoint, select_weights, sha256_of
from visionssm.weights.convert import is_dense, save_safetensors, to_own_names

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
    return Path(shutil.copy(file, folder / f"{row.name}{''.join(Path(row.url).suffixes[-1:])}"))


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
    weights = select_weights(read_checkpoint(file), entry, str(file))
    dense = is_dense(weights)
    own = to_own_names(weights, _model(name, dense), str(file))
    save_safetensors(own, out, {"architecture": name.split(".")[0], "source": file.name, "source_sha256": sha256_of(file)})
    what = "with the detector's or segmentor's other parts, " if dense else ""
    return f"{out}: {len(own)} tensors, {what}{out.stat().st_size / 1e6:.1f} MB"


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
    weights = select_weights(content, entry, str(file))
    dense = is_dense(weights)
    yield f"{file}: {file.stat().st_size:,} bytes, sha256 {sha256_of(file)}"
    entries = [key for key, value in content.items() if not isinstance(value, Tensor)]
    yield f"{len(weights)} tensors of {_dtypes(weights)}" + (f"; the file holds {', '.join(map(str, entries))}" if entries else "")
    model = _model(name, dense)
    load_checkpoint(model, weights)
    yield f"all {len(model.state_dict())} tensors of {name} loaded, {parameters(model):,} parameters, none missing, none left over"
    if dense:
        yield f"the other {sum(not key.startswith('backbone.') for key in weights)} tensors are the head's and were not loaded"
        return
    classifier = Classifier(model, source=str(file), device="cpu")
    channels, height, width = classifier.data_config["input_size"]
    mode = "RGB" if channels == 3 else "L"
    picture = open_image(image, channels) if image else Image.linear_gradient("L").resize((width, height)).convert(mode)
    yield f"{image or 'a plain gradient from black to white'}, the likeliest of {model.num_classes} classes:"
    yield from (f"  {score:6.1%}  {label}" for label, score in classifier.likeliest(picture))


def _model(name: str, dense: bool) -> nn.Module:
    return timm.create_model(name, **({"num_classes": 0} if dense else {}))


def _dtypes(weights: dict[str, Tensor]) -> str:
    return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()}))
