"""Golden files of the operators: exact inputs, and digests of results that are small and still see any single wrong element.

A result is cut into blocks of consecutive elements, and each block is reduced to one sum with fixed random weights of magnitude
0.5 to 1.5. An element that is off by more than `tolerance` times the array's largest value moves its block's sum by more than
half of that, which is the bound that `compare` applies. A block of one element is the array itself, weighted.
"""

import json
import os
from pathlib import Path

import numpy as np

BLOCK = 16


def digest(array: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """[block, largest magnitude, block sums...] in the precision of `array`."""
    wide = np.asarray(array, dtype=np.float64).ravel()
    return np.concatenate([[block, np.abs(wide).max()], _block_sums(wide, block)]).astype(array.dtype)


def compare(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raise AssertionError if any element of `actual` differs from the array whose digest is `expected`.

    Args:
        name: for the message.
        actual: the array under test.
        expected: from `digest`.
        tolerance: relative to the largest magnitude of the reference array.
    """
    block, scale, sums = int(expected[0]), float(expected[1]), expected[2:].astype(np.float64)
    wide = np.asarray(actual, dtype=np.float64).ravel()
    if len(sums) != -(-wide.size // block):
        raise AssertionError(f"{name}: {wide.size} elements, expected {len(sums)} blocks of {block}")
    error = np.abs(_block_sums(wide, block) - sums) / (scale or 1.0)
    wrong = ~(error <= tolerance / 2)  # NaN is wrong too
    if wrong.any():
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {len(sums)} blocks differ; elements {worst * block} to {worst * block + block - 1} "
            f"by {error[worst]:.2e} of the largest value, tolerance {tolerance:.0e}"
        )


def _block_sums(flat: np.ndarray, block: int) -> np.ndarray:
    draws = np.random.Generator(np.random.PCG64(0)).random((2, flat.size))
    weighted = flat * np.where(draws[0] < 0.5, -1.0, 1.0) * (0.5 + draws[1])
    return np.pad(weighted, (0, -flat.size % block)).reshape(-1, block).sum(1)


class Golden:
    """One golden file, as make_ops.py writes it; the folder can be changed by the environment variable VISIONSSM_GOLDEN."""

    def __init__(self, name: str) -> None:
        path = Path(os.environ.get("VISIONSSM_GOLDEN", Path(__file__).parent)) / f"ops_{name}.npz"
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "facts"}
            facts = json.loads(str(archive["facts"]))
        self.cases: list = facts["cases"]
        self.arrays |= {key: self.arrays[first] for key, first in facts["same_as"].items()}

    def inputs(self, case: str) -> dict[str, np.ndarray]:
        """The exact inputs of `case`, by name."""
        return {key.removeprefix(f"{case}/"): a for key, a in self.arrays.items() if key.startswith(f"{case}/") and key[-1] != "~"}

    def compare(self, case: str, actual: dict[str, np.ndarray], tolerance: float) -> None:
        """`actual` holds every result of `case`, by name, and nothing else, within `tolerance`."""
        expected = {key[len(case) + 1 : -1]: a for key, a in self.arrays.items() if key.startswith(f"{case}/") and key[-1] == "~"}
        if actual.keys() != expected.keys():
            raise AssertionError(f"{case}: results {sorted(actual)}, expected {sorted(expected)}")
        for name, array in actual.items():
            compare(f"{case}/{name}", array, expected[name], tolerance)
