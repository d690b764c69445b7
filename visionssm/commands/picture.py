"""The picture of `visionssm classify --out`: every image with a bar per class."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visionssm.errors import UserError, first_line

from .classifier import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 100  # a row each; more make a picture that viewers refuse
_THUMBNAIL = (480, 320)


def new_figure(path: Path, images: Sequence[Path]) -> "Figure":
    """An empty figure for `path`; refuses what cannot be written before any work is done.

    Args:
        path: the file to write; its suffix is the format.
        images: the images that go into it, none of which may be overwritten.

    Raises:
        UserError: matplotlib is missing, an unknown suffix, no such folder, an image of the same path.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--out: a picture needs matplotlib: pip install 'visionssm[explain]'") from None
    figure = Figure(layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(
            f"--out: {path}: cannot write {path.suffix or 'a file without a suffix'}, expected one of {', '.join(kinds)}"
        )
    if not path.parent.is_dir():
        raise UserError(f"--out: {path.parent}: no such folder")
    if path.is_dir():
        raise UserError(f"--out: {path}: a folder, expected a file")
    if path.resolve() in {image.resolve() for image in images}:
        raise UserError(f"--out: {path} is one of the images and would be overwritten")
    return figure


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure at 100 dots per inch.

    Raises:
        UserError: the file cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # class names in scripts that the font lacks
        try:
            figure.savefig(path, dpi=100)
        except OSError as error:
            raise UserError(f"--out: {path}: {first_line(error)}") from error


class Picture:
    """Collects predictions and draws them; path, images and errors as in `new_figure`."""

    def __init__(self, path: Path, images: Sequence[Path]) -> None:
        self.figure = new_figure(path, images)
        self.path = path
        self.predictions: list[Prediction] = []
        self.left_out = 0

    def add(self, prediction: Prediction) -> None:
        """Keep a prediction, with its image made small."""
        if len(self.predictions) == MAX_IMAGES:
            self.left_out += 1
            return
        prediction.image.thumbnail(_THUMBNAIL)
        self.predictions.append(prediction)

    def save(self) -> str:
        """Draw and write. Returns the path, with a remark where images were left out.

        Raises:
            UserError: the file cannot be written.
        """
        rows = len(self.predictions)
        classes = len(self.predictions[0].classes)
        self.figure.set_size_inches(9, rows * max(2.2, 0.3 * classes))
        grid = self.figure.subplots(rows, 2, squeeze=False, width_ratios=(1, 1.6))
        for (left, right), prediction in zip(grid, self.predictions, strict=True):
            left.imshow(prediction.image, cmap="gray", vmin=0, vmax=255)
            left.set(xticks=[], yticks=[])
            left.set_title(prediction.path.name, fontsize=9, parse_math=False)
            self._draw_bars(right, prediction)
        write_figure(self.figure, self.path)
        return f"{self.path} (the first {rows} images)" if self.left_out else str(self.path)

    @staticmethod
    def _draw_bars(axes: "Axes", prediction: Prediction) -> None:
        places = range(len(prediction.classes))
        axes.barh(places, [score for _, score in prediction.classes], color="tab:green", alpha=0.4)
        for place, (name, score) in zip(places, prediction.classes, strict=True):
            axes.text(0.01, place, f"{score:.0%}  {name}", va="center", fontsize=9, parse_math=False, clip_on=True)
        axes.set(xlim=(0, 1), ylim=(len(prediction.classes) - 0.4, -0.6))
        axes.axis("off")
