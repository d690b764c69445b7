"""Draw the README's picture: one real handwritten digit and the order in which each scan path visits its positions.

    python tools/draw_paths.py docs/scan_paths.png

Needs the `train` extra (matplotlib, scikit-learn).
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from sklearn.datasets import load_digits

from visionssm.ops import ScanPaths

PATHS = {
    "h": "h\nrow by row",
    "v": "v\ncolumn by column",
    "h_flip": "h_flip\nthe rows, backwards",
    "v_flip": "v_flip\nthe columns, backwards",
    "w2": "w2\nin 2 x 2 windows",
    "w4_flip": "w4_flip\n4 x 4 windows, backwards",
}


def draw(axis: plt.Axes, digit: np.ndarray, name: str, title: str) -> None:
    """One panel: the digit, and the path over it from dark to bright."""
    steps = ScanPaths((name,), digit.shape).table[0]
    rows, columns = np.divmod(steps[steps >= 0], digit.shape[1])
    points = np.stack([columns, rows], axis=-1).astype(float)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    axis.imshow(digit, cmap="Greys", alpha=0.35)
    axis.add_collection(LineCollection(segments, cmap="plasma", array=np.arange(len(segments)), linewidths=2.2, capstyle="round"))
    axis.plot(*points[0], "o", color="#0d0887", markersize=9)
    axis.set_title(title, fontsize=12)
    axis.set_axis_off()


def main() -> None:
    """Parse the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="PNG file to write")
    out = parser.parse_args().out
    digit = load_digits().images[2]
    figure, axes = plt.subplots(1, len(PATHS), figsize=(2.6 * len(PATHS), 3.2))
    for axis, (name, title) in zip(axes, PATHS.items(), strict=True):
        draw(axis, digit, name, title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
