"""Write model_cards/, model-index.yml and the README's table of checkpoints from the table of published checkpoints.

    python tools/make_model_cards.py [--check]

Published figures come from visionssm/weights/checkpoints.json, ours from the files that tools/measure_models.py and
tools/benchmark_cifar10.py write.
`--check` writes nothing and fails where a file differs from what would be written.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import timm

import visionssm  # noqa: F401  registers the models
from visionssm.weights import Checkpoint, checkpoints

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "models_cpu.json").read_text())
HEADING = {"classification": "image-classification", "detection": "object-detection", "segmentation": "image-segmentation"}
RUNS = [row for path in sorted((ROOT / "benchmarks").glob("cifar10_*.csv")) for row in csv.DictReader(path.open(newline=""))]
DATASETS = {"classification": "imagenet-1k", "detection": "coco", "segmentation": "ade20k"}
FIGURES = {
    "top1": "ImageNet-1k top-1, %",
    "top5": "ImageNet-1k top-5, %",
    "top1_recorded_with_amp": "top-1 recorded in the authors' one-file script (AMP), %",
    "top5_recorded_with_amp": "top-5 recorded in the authors' one-file script (AMP), %",
    "top1_paper": "top-1 in the paper, %",
    "box_AP": "COCO box AP",
    "box_AP50": "COCO box AP at IoU 0.5",
    "box_AP75": "COCO box AP at IoU 0.75",
    "mask_AP": "COCO mask AP",
    "mask_AP50": "COCO mask AP at IoU 0.5",
    "mask_AP75": "COCO mask AP at IoU 0.75",
    "mIoU_single_scale": "ADE20K mIoU, single scale, %",
    "mIoU_multi_scale": "ADE20K mIoU, multi scale, %",
    "params": "parameters",
    "gflops": "GFLOPs (multiply-adds) by the authors' counter",
    "a100_img_s": "images/s, inference, A100, batch 128",
    "a100_train_img_s": "images/s, training, A100, batch 128",
    "input": "input",
    "schedule": "schedule",
}
METRICS = {"top1": "accuracy", "top5": "top-5 accuracy", "box_AP": "box AP", "mask_AP": "mask AP", "mIoU_single_scale": "mIoU"}


def main() -> None:
    """Write or compare every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file differs")
    check = parser.parse_args().check
    wanted = files()
    stale = [path for path in (ROOT / "model_cards").glob("*.md") if path not in wanted]
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if check:
        for path in (*differing, *stale):
            print(f"{path.relative_to(ROOT)} is not what the table says; run tools/make_model_cards.py")
        sys.exit(1 if differing or stale else 0)
    for path in stale:
        path.unlink()
    for path in differing:
        path.write_text(wanted[path])
    print(f"{len(wanted)} files, {len(differing)} of them changed, {len(stale)} deleted")


def files() -> dict[Path, str]:
    """Every file that this tool owns, with its text."""
    rows = sorted(checkpoints(status=None), key=lambda row: row.shipped_file is not None)
    cards = {ROOT / "model_cards" / f"{row.name}.md": card(row) for row in rows}
    cards[ROOT / "model_cards" / "README.md"] = index(rows)
    cards[ROOT / "model-index.yml"] = mim_index([row for row in rows if row.status == "available" and not row.shipped_file])
    return cards


def card(row: Checkpoint) -> str:
    """One page: head, what it is, origin, reported, measured, use, limits."""
    parts = [head(row), f"# {row.name}", what_it_is(row), origin(row)]
    parts.append(trained(row) if row.shipped_file else reported(row))
    if row.model:
        parts.append(measured(row))
    if row.status == "available":
        parts.append(usage(row))
    parts.append(limits(row))
    return "\n\n".join(parts) + "\n"


def head(row: Checkpoint) -> str:
    """The YAML that the Hugging Face hub reads."""
    licence = row.origin.license if row.origin.license != "unclear" else "other"
    lines = ["---", f"license: {licence}", "library_name: timm", f"pipeline_tag: {HEADING[row.task]}"]
    lines += ["tags:", "- visionssm", "- timm", "- state-space-model", f"- {row.family.replace('_', '-')}"]
    dataset = dataset_of(row)
    lines += ["datasets:", f"- {dataset}", "model-index:", f"- name: {row.name}", "  results:"]
    lines += ["  - task:", f"      type: {HEADING[row.task]}", "    dataset:"]
    lines += [f"      name: {dataset}", f"      type: {dataset}", "    metrics:"]
    for key, metric in METRICS.items():
        if key in row.reported:
            lines += [f"    - type: {metric}", f"      value: {row.reported[key]}", "      verified: false"]
    return "\n".join([*lines, "---"])


def dataset_of(row: Checkpoint) -> str:
    """The hub's name of what a checkpoint was trained on."""
    return "cifar10" if row.shipped_file else DATASETS[row.task]


def what_it_is(row: Checkpoint) -> str:
    """One paragraph."""
    if row.model is None:
        subject = "A checkpoint that no model of this zoo can take"
    else:
        doc = timm.model_entrypoint(row.model).__doc__.splitlines()[0].rstrip(".")
        subject = f"{doc}, our `{row.model}`"
    if row.shipped_file:
        return f"{subject}, trained by us on CIFAR-10. The architecture is that of *{row.origin.title}* ({row.origin.paper})."
    tasks = {
        "classification": "trained on ImageNet-1k to classify images",
        "detection": "as the backbone of a Mask R-CNN trained on COCO",
        "segmentation": "as the backbone of an UPerNet trained on ADE20K",
    }
    status = {
        "available": "",
        "mislinked": " **No file to load: the published link serves another one.**",
        "unreleased": " **No file to load: it was never released.**",
        "unsupported": " **Not supported: the file has a layout that no model here has.**",
    }[row.status]
    return f"{subject}, {tasks[row.task]}. Published by the authors of *{row.origin.title}* ({row.origin.paper}).{status}"


def origin(row: Checkpoint) -> str:
    """Where the file lies and under which licence."""
    facts = {
        "repository": "" if row.shipped_file else row.origin.origin,
        "file": f"`{row.shipped_file.relative_to(ROOT)}`, in the package" if row.shipped_file else row.url or "none",
        "older addresses": ", ".join(row.other_urls),
        "size": f"about {row.size_mb} MB" if row.size_mb else "not stated",
        "SHA-256": row.sha256 or "not published; recorded at the first download, a later change is an error",
        "weights under": f"`{row.entry}`" if row.entry else "",
        "our config" if row.shipped_file else "authors' config": f"`{row.config}`" if row.config else "",
        "training log": row.log or "",
        "licence": f"{row.origin.license}. {row.origin.license_note}",
    }
    return "## Origin\n\n" + table(("what", "here" if row.shipped_file else "as published"), facts)


def reported(row: Checkpoint) -> str:
    """The authors' figures."""
    facts = {FIGURES[key]: row.reported[key] for key in FIGURES if key in row.reported}
    return "## Reported by the authors\n\nNot evaluated by us: the file could not be reached where this was written.\n\n" + table(
        ("figure", "value"), facts
    )


def trained(row: Checkpoint) -> str:
    """Our training, from the file that a command wrote: this model, and those that were trained beside it."""
    lines = ["| config | test accuracy, % | parameters | epochs | images/s | GPU memory, MiB |", "|---|---|---|---|---|---|"]
    own = next((run for run in RUNS if row.config.endswith(f"/{run['config']}.py")), RUNS[0])
    for run in RUNS:
        name = f"**{run['config']}**" if run is own else run["config"]
        facts = (f"{float(run['accuracy']):.2f}", f"{int(run['parameters']):,}", run["epochs"], run["images_per_s"])
        lines.append(f"| {name} | {' | '.join(facts)} | {run['peak_memory_mib']} |")
    where = "{device}, {processes_on_gpu} of these trainings on each GPU, PyTorch {torch}, timm {timm}, {date}".format(**own)
    note = "One recipe for all, but for a config whose name has more than the model's; images/s of the training loop. No epoch was"
    note += " chosen by the test images: the last one counts."
    return f"## Trained here\n\n`tools/benchmark_cifar10.py` on {where}. {note}\n\n" + "\n".join(lines)


def measured(row: Checkpoint) -> str:
    """Our figures for the architecture, from the file that a command wrote."""
    ours = MEASURED["models"][row.model]
    parity = ours["parity"]
    error = (
        f"{parity['logits']:.1e} of the largest logit, the worst of {parity['cases']} cases, with weights filled by rule"
        if parity
        else ""
        if row.shipped_file
        else "no reference output of this variant at hand; smaller ones of its family agree"
    )
    facts = {
        "parameters": f"{ours['parameters']:,}",
        f"multiply-adds at {ours['image']} px by the published rule": f"{ours['gmacs_published_rule']:.2f} G",
        f"FLOPs at {ours['image']} px by our count": f"{ours['gflops']:.2f} G, {ours['gflops_of_scans']:.2f} of them in scans",
        f"one image of {ours['image']} px, float32, CPU": f"{ours['ms_per_image_fp32']} ms",
        "error against the published architecture's output": error,
    }
    where = "{device}, PyTorch {torch}, {date}".format(**MEASURED["environment"], date=ours["date"])
    note = "" if row.task == "classification" else " Of the backbone as a classifier."
    note = " With a head of 1000 classes." if row.shipped_file else note
    return f"## Measured here\n\n`tools/measure_models.py` on {where}.{note}\n\n" + table(("figure", "value"), facts)


def usage(row: Checkpoint) -> str:
    """How to load it."""
    if row.task == "classification":
        code = f'''import timm
import visionssm

model = timm.create_model("{row.name}", pretrained=True)
backbone = timm.create_model("{row.name}", pretrained=True, features_only=True)'''
    else:
        code = f'''import timm
import visionssm
from visionssm.weights import download

backbone = timm.create_model("{row.model}", num_classes=0)
file = download("{row.name}")
visionssm.load_checkpoint(backbone, file)  # the backbone; the rest of the file is the head's'''
    shell = f"visionssm download {row.name} --to . --format safetensors   # under our names"
    return f"## Use\n\n```python\n{code}\n```\n\n```sh\n{shell}\n```"


def limits(row: Checkpoint) -> str:
    """What to know before use."""
    notes = [f"- {note}" for note in row.notes]
    if row.status == "available" and not row.shipped_file:
        notes.append(
            "- The file is a pickle. It is read without running anything in it, and refused if it names more than weights need."
        )
    if row.task == "classification":
        name = "CIFAR-10" if row.shipped_file else "ImageNet-1k"
        notes.append(f"- Trained on {name}: its classes, its photographs and their biases; not for decisions about people.")
    return "## Limits\n\n" + "\n".join(notes)


def index(rows: list[Checkpoint]) -> str:
    """The list of all cards."""
    lines = ["# Model cards", "", "Written by `tools/make_model_cards.py`; reported figures are the authors'.", ""]
    lines += ["| checkpoint | task | reported | file |", "|---|---|---|---|"]
    for row in rows:
        figures = ", ".join(f"{METRICS[key]} {row.reported[key]}" for key in METRICS if key in row.reported)
        lines.append(f"| [{row.name}]({row.name}.md) | {row.task} | {figures} | {row.status} |")
    return "\n".join(lines) + "\n"


def mim_index(rows: list[Checkpoint]) -> str:
    """What `mim search` and `mim download` read."""
    families = dict.fromkeys(row.family for row in rows)
    lines = ["# Written by tools/make_model_cards.py", "Collections:"]
    for family in families:
        first = next(row for row in rows if row.family == family)
        lines += [f"  - Name: {family}", "    Paper:", f"      Title: {quoted(first.origin.title)}"]
        lines += [f"      URL: https://arxiv.org/abs/{first.origin.paper.removeprefix('arXiv:')}", "    README: README.md"]
    lines.append("Models:")
    for row in rows:
        lines += [
            f"  - Name: {row.name}",
            f"    In Collection: {row.family}",
            f"    Metadata: {{Training Data: {DATASETS[row.task]}}}",
        ]
        lines += [f"    Weights: {quoted(public_url(row))}", "    Results:"]
        lines += [f"      - Task: {row.task}", f"        Dataset: {DATASETS[row.task]}", "        Metrics:"]
        lines += [f"          {metric}: {row.reported[key]}" for key, metric in METRICS.items() if key in row.reported]
    return "\n".join(lines) + "\n"


def public_url(row: Checkpoint) -> str:
    """An address that a browser takes."""
    if row.hub_file is None:
        return row.url
    repository, file = row.hub_file
    repository, _, revision = repository.partition("@")
    return f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{file}"


def quoted(text: str) -> str:
    """A YAML string."""
    return json.dumps(text)


def table(header: tuple[str, str], facts: dict[str, Any]) -> str:
    """A Markdown table of the facts that there are."""
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value not in ("", None)]
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *rows])


if __name__ == "__main__":
    main()
