"""Put our own weights into the package: `python tools/ship_weights.py FOLDER...`, folders that tools/benchmark_cifar10.py wrote.

Copies `<model>.cifar10.safetensors`, of a recipe that enlarges its images `<model>.cifar10_64px.safetensors`, to
visionssm/weights/files/ and the tables, put together, to benchmarks/ and docs/training.md, enters each file in
visionssm/weights/checkpoints.json with its hash and its measured accuracy, and writes the model cards. Of a file in several
folders, and of a config in several tables, the last counts; runs that were cut short do not.
Run again with other files, it replaces what it has written.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from document_sections import replace_sections

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "visionssm" / "weights" / "checkpoints.json"
FILES = ROOT / "visionssm" / "weights" / "files"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # sorted, as folders are
LICENSE = "The weights are ours, under the package's licence; the images they were trained on are for research."


def tag_of(input_size: int) -> str:
    """What weights for images of this size are called after the model's name."""
    return "cifar10" if input_size == 32 else f"cifar10_{input_size}px"


def preprocessing(config: str) -> dict[str, Any]:
    """How the recipe makes its test images, in the words of timm's configs."""
    from visionssm.engine.config import load_config

    recipe = load_config(config)
    transform = recipe.test_dataloader.dataset.dataset.get("transform", {})
    return {
        "input_size": [3, recipe.input_size, recipe.input_size],
        "interpolation": transform.get("interpolation", "bilinear"),  # as timm's create_transform has it
    }


def entry(file: Path, measured: dict[str, str]) -> dict[str, Any]:
    """A row of the table of checkpoints."""
    from safetensors import safe_open

    from visionssm.weights import sha256_of

    with safe_open(file, "pt") as content:
        half = {content.get_slice(name).get_dtype() for name in content.keys()} <= {"F16", "I64"}  # noqa: SIM118  no mapping
    model = measured["model"]
    images = preprocessing(measured["config"])
    top1 = float(measured["accuracy_float16" if half else "accuracy"])
    return {
        "family": "local_mamba" if model.startswith("local") else model.split("_")[0],
        "model": model,
        "tag": tag_of(images["input_size"][-1]),
        "task": "classification",
        "url": f"package://{file.name}",
        "size_mb": round(file.stat().st_size / 1e6, 1),
        "sha256": sha256_of(file),
        "reported": {"input": images["input_size"][-1], "top1": round(top1, 2)},
        "config": f"configs/classification/{measured['config']}.py",
        "notes": [
            f"Trained on CIFAR-10 for {measured['epochs']} epochs; the moving average of the weights after the last one"
            f"{', rounded to float16' if half else ''}."
        ],
        "preprocessing": images,
        "classes": CLASSES,
        "license": "apache-2.0",
        "license_note": LICENSE,
    }


def read_table(folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """The one table in a folder."""
    tables = list(folder.glob("cifar10_*.csv"))
    if len(tables) != 1:
        sys.exit(f"FOLDER: {folder} holds {len(tables)} files cifar10_*.csv, expected one")
    with tables[0].open(newline="") as file:
        return tables[0], list(csv.DictReader(file))


def weights(folder: Path, rows: list[dict[str, str]]) -> dict[str, tuple[Path, dict[str, str]]]:
    """By name: the file in a folder, and the row of its run, the first seed's."""
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for measured in rows:
        if not list(folder.glob(f"{measured['model']}.*.safetensors")):
            continue
        file = folder / f"{measured['model']}.{tag_of(preprocessing(measured['config'])['input_size'][-1])}.safetensors"
        if not file.exists() or file.name in found:  # a peer, or another seed
            continue
        if measured["status"] != "finished":
            sys.exit(f"{folder}: the run of {measured['model']} has the status {measured['status']!r}, expected 'finished'")
        found[file.name] = file, measured
    if not found:
        sys.exit(f"FOLDER: {folder} holds no weights of a model in its table")
    return found


def document(runs: list[dict[str, str]]) -> list[str]:
    """The table for docs/training.md."""
    lines = ["| config | parameters | epochs | accuracy, % | images/s | memory, MiB |", "|---|---:|---:|---:|---:|---:|"]
    for run in runs:
        cells = [run["epochs"], f"{float(run['accuracy']):.2f}", run["images_per_s"], run["peak_memory_mib"]]
        lines.append(f"| `{run['config']}` | {int(run['parameters']):,} | {' | '.join(cells)} |")
    used = list(dict.fromkeys(f"{run['device']}, torch {run['torch']}, {run['date']}" for run in runs))
    return [*lines, "", f"Measured on {'; '.join(used)}: benchmarks/cifar10_h200.csv."]


def main() -> None:
    """Copy, enter, write the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    runs: dict[tuple[str, str], dict[str, str]] = {}
    shipped: dict[str, tuple[Path, dict[str, str]]] = {}
    for folder in parser.parse_args().folders:
        table, rows = read_table(folder)
        runs |= {(row["config"], row["seed"]): row for row in rows if row["status"] == "finished"}
        shipped |= weights(folder, rows)
    FILES.mkdir(exist_ok=True)
    entries = []
    for source, measured in shipped.values():
        shutil.copyfile(source, FILES / source.name)
        entries.append(entry(FILES / source.name, measured))
    with (ROOT / "benchmarks" / table.name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in runs.values() for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs.values())
    content = json.loads(TABLE.read_text())
    table_rows = {(row["model"], row["tag"]): row for row in content["checkpoints"]}
    table_rows |= {(row["model"], row["tag"]): row for row in entries}  # in the old one's place: a model's first is its default
    content["checkpoints"] = list(table_rows.values())
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
    replace_sections(ROOT / "docs" / "training.md", {"cifar10": document(list(runs.values()))})
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_model_cards.py")], check=True)


if __name__ == "__main__":
    main()
