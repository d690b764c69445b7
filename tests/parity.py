"""Checks of a model against the published code's recorded outputs (tests/golden), and the table that reports them."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import timm
import torch

from golden.fill import fill, image

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # of the largest magnitude compared; float32 noise is about 1e-6
ROWS: list[tuple[str, str, str, float]] = []  # (model, case, what, error), printed at the end of the run


def load_golden(name: str) -> dict:
    """The record of one golden model: parameters, state_dict [[key, shape]...], cases."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@lru_cache(maxsize=1)
def _logits() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "models_logits.npz") as arrays:
        return dict(arrays)


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """A published checkpoint's state dict, filled by key name."""
    return {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in load_golden(name)["state_dict"]}


def build(model: str, checkpoint_filter_fn, golden: str | None = None, **kwargs) -> torch.nn.Module:
    """`model` in eval mode with the weights of golden record `golden`, loaded strictly through the family's filter."""
    net = timm.create_model(model, **kwargs).eval()
    net.load_state_dict(checkpoint_filter_fn(published_weights(golden or model), net), strict=True)
    return net


def images(case: dict) -> torch.Tensor:
    """The case's image batch."""
    return torch.from_numpy(image(*case["image"]))


def check_logits(golden: str, case: dict, logits: torch.Tensor) -> None:
    """Logits agree to TOLERANCE of the reference's largest logit."""
    expected = _logits()[f"{golden}/{case['name']}"]
    assert tuple(logits.shape) == expected.shape
    _record(golden, case["name"], "logits", np.abs(logits.detach().numpy() - expected).max() / np.abs(expected).max())


def check_feature(golden: str, case: dict, name: str, feature: torch.Tensor, summary: dict) -> None:
    """A feature's shape, mean, std, first and last values agree to TOLERANCE of its largest magnitude."""
    assert list(feature.shape) == summary["shape"], f"{golden} {name}: {list(feature.shape)} != {summary['shape']}"
    values = feature.detach().double().numpy()
    flat = values.ravel()
    gaps = [values.mean() - summary["mean"], values.std(ddof=summary["ddof"]) - summary["std"]]
    gaps += list(flat[:8] - np.array(summary["first8"])) + list(flat[-8:] - np.array(summary.get("last8", flat[-8:])))
    _record(golden, case["name"], name, np.abs(gaps).max() / np.abs(values).max())


def _record(golden: str, case: str, what: str, error: float) -> None:
    ROWS.append((golden, case, what, float(error)))
    assert error <= TOLERANCE, f"{golden}, {case}: {what} is off by {error:.2e} of its scale, allowed {TOLERANCE:.0e}"


def table() -> list[str]:
    """One line per model and case: the errors of the logits and of the worst feature, relative to their scale."""
    lines = []
    for golden, case in dict.fromkeys(row[:2] for row in ROWS):
        errors = {what: error for g, c, what, error in ROWS if (g, c) == (golden, case)}
        logits = f"{errors.pop('logits'):.1e}" if "logits" in errors else "-"
        worst = f"{max(errors.values()):.1e} ({max(errors, key=errors.get)})" if errors else "-"
        lines.append(f"{golden:36} {case:24} {logits:>10}   {worst}")
    return [f"{'model':36} {'case':24} {'logits':>10}   worst feature", *lines] if lines else []


def worst_logits() -> dict[str, dict]:
    """By golden record the number of cases and the largest error of a logit, relative to the largest logit."""
    errors = {}
    for golden, case, what, error in ROWS:
        if what == "logits":
            errors.setdefault(golden, {})[case] = error
    return {golden: {"cases": len(cases), "logits": float(f"{max(cases.values()):.1e}")} for golden, cases in errors.items()}
