"""The two recorded references in float64, to 1e-9 of their scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from golden.fill import image
from golden.ops_golden import Golden, compare
from parity import build
from visionssm.explain import Attention, record, rollout_row
from visionssm.explain.layout import TokenLayout
from visionssm.explain.operands import MixerFactors, ScanOperands
from visionssm.models.vim import checkpoint_filter_fn
from visionssm.ops import ScanPaths

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def reference():
    with np.load(GOLDEN / "vim_tiny_attention.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tape():
    model = build("vim_tiny_patch16_224", checkpoint_filter_fn).double()
    with record(model) as tape, torch.no_grad():
        model(torch.from_numpy(image(2, 224, 224)).double())
    return tape


def close(actual, expected):
    assert_close(actual, torch.from_numpy(expected), rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 11, 23])
def test_class_rows(tape, reference, layer, direction):
    attention = tape.attention(layer).direction(direction)
    key = f"layers.{layer}.{direction}.cls_row"
    close(attention.rows("cls"), reference[f"{key}_mean"])
    compare(key, attention.rows("cls", channels=slice(4)).numpy(), reference[f"{key}_first4~"], TOLERANCE)


def test_mean_matrix(tape, reference):
    compare("matrix", tape.attention(11).matrix()[0].numpy(), reference["layers.11.mean_matrix~"], TOLERANCE)


def test_rollout(tape, reference):
    close(rollout_row(tape, normalize=False), reference["rollout_sum"])


def test_single_scan():
    """`attention_L20`: alpha, and diag(silu(z)) (alpha + D I)."""
    golden = Golden("vim")
    inputs = {name: torch.from_numpy(array).double() for name, array in golden.inputs("attention_L20").items()}
    steps = torch.cat([inputs["delta"], inputs["B"], inputs["C"]], dim=1).mT[:, None, :, None]  # [B, 1, L, 1, E + 2N]
    operands = ScanOperands(
        steps, inputs["A"][None], inputs["D"][None], ScanPaths(("h",), (1, 20)), None, inputs["delta_bias"][None]
    )
    right, taps = (torch.ones(shape, dtype=torch.float64) for shape in ((2, 1, 1, 20, 4), (1, 4, 1, 1)))
    factors = MixerFactors(right, torch.nn.functional.silu(inputs["z"].mT), taps)
    attention = Attention(operands, TokenLayout((1, 20)), lambda: factors)
    for name, matrix in (("alpha", attention), ("alpha_gated_with_D", attention.include("mixer"))):
        actual = matrix.matrix(channels="all").permute(0, 2, 1, 3).contiguous().numpy()
        compare(name, actual, golden.arrays[f"attention_L20/{name}~"], TOLERANCE)
