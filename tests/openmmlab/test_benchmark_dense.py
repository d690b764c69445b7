"""The driver of the runs on real images: training by the clock, the table."""

import json
import math
from pathlib import Path

import pytest

from visionssm.engine.launch import main_train, newest_checkpoint

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """The tools' folder, from which they import one another."""
    monkeypatch.syspath_prepend(str(TOOLS))


def test_training_ends_on_time_at_a_rate_of_zero(tools, digit_scenes, tmp_path, capsys):
    from time_limit import timed_config

    seconds = 6
    config = timed_config("upernet_vmamba-nano_digit-scenes", seconds, tmp_path)
    options = [f"data_root={digit_scenes}", "default_hooks.logger.interval=1", "test_dataloader.dataset.indices=1"]
    options += [f"{loader}_dataloader.num_workers=0" for loader in ("train", "test")]
    options += ["train_dataloader.persistent_workers=False", "train_dataloader.batch_size=2"]
    work = tmp_path / "work"
    assert main_train([config, "--work-dir", str(work), "--cfg-options", *options]) == 0, capsys.readouterr().err
    (log,) = work.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert newest_checkpoint(work) == str(work / f"iter_{len(rows)}.pth")
    begun = [sum(row["time"] for row in rows[1 : n + 1]) / seconds for n in range(len(rows))]  # of the time, as each update begins
    assert begun[-1] < 1 + rows[-1]["time"] / seconds
    for n, (row, share) in enumerate(zip(rows, begun, strict=True)):
        warmup = 1e-3 * (n + 1) / 100
        assert 0 < row["lr"] <= warmup
        assert row["lr"] == pytest.approx(warmup * (1 + math.cos(math.pi * share)) / 2, abs=0.2 * warmup)


def test_table(tools):
    from benchmark_dense import table

    both = {
        "machine": {"gpus": ["GPU"] * 2, "cores": 4, "torch": "2.11"},
        "started together": ["segmentor", "segmentor from scratch"],
    }
    alone = {"machine": {"gpus": [], "cores": 2, "torch": "2.12"}, "started together": ["detector"]}
    common = {"parameters": 2_500_000, "updates": 100, "seconds of training and test": 90.0, "pretrained": False}
    results = {
        "detector": {
            **common,
            **alone,
            "test": {"bbox_mAP": 1.0, "segm_mAP": 2.0},
            "test on the training images": {"bbox_mAP": 45.04, "segm_mAP": 40.0},
        },
        "segmentor": {**common, **both, "pretrained": True, "test": {"mIoU": 55.54}},
        "segmentor from scratch": {**common, **both, "test": {"mIoU": 50.0}},
    }
    lines = table(results)
    assert lines[2] == "| detector | 2.50 | 100 | 1.5 | 45.0 | 40.0 | 1.0 | 2.0 |  |"
    assert lines[3].startswith("| segmentor, from CIFAR-10 | 2.50 |")
    assert lines[3].endswith("|  |  |  |  | 55.5 |")
    assert {line.count("|") for line in lines[:5]} == {10}
    assert lines[-2:] == [
        "Alone: detector; no GPU, 2 cores, torch 2.12.",
        "Runs at the same time: segmentor, segmentor from scratch; 2 x GPU, 4 cores, torch 2.11.",
    ]


def test_the_page_shows_what_was_measured(tools):
    from benchmark_dense import ROOT, RUNS, table

    results = json.loads((ROOT / "benchmarks" / "dense_h200.json").read_text())
    page = (ROOT / "docs" / "dense.md").read_text(encoding="utf-8")
    section = page.partition("<!-- real images -->\n")[2].partition("<!-- /real images -->")[0]
    assert section.splitlines() == table(results)
    commands = page.partition("the table is of\n")[2].partition("<!-- real images -->")[0]
    assert results.keys() == RUNS.keys()
    for run in results.values():
        assert f"--seconds {run['seconds of the schedule']:.0f}" in commands
        assert " ".join(run["options"]) in commands


def test_a_segmentor_from_given_weights_needs_them(tools, monkeypatch, tmp_path, capsys):
    from benchmark_dense import main

    monkeypatch.setattr("sys.argv", ["benchmark_dense.py", str(tmp_path), "--runs", "segmentor", "-o", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit):
        main()
    assert "--runs segmentor: expected --pretrained WEIGHTS" in capsys.readouterr().err
