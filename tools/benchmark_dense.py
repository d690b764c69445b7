"""Train the nano detector and segmentors on real images and write what they reach to a JSON file.

`python tools/benchmark_dense.py DATA [-o results.json] [--pretrained WEIGHTS] [--seconds N]`; DATA is the folder with
coco_tiny.zip and camvid.zip. Every run is a process of its own, and all run at the same time; with more than one GPU the detector
has the first for itself. `--document [-o results.json]` fills the section of docs/dense.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from document_sections import replace_sections

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "dense_h200.json"
DETECTOR = "detection/mask-rcnn_vmamba-nano_fpn_coco-tiny"
SEGMENTOR = "segmentation/upernet_vmamba-nano_camvid"
PEER = "segmentation/upernet_resnet18_camvid"
RUNS = {  # name: config, archive
    "detector": (DETECTOR, "coco_tiny"),
    "segmentor": (SEGMENTOR, "camvid"),
    "segmentor from scratch": (SEGMENTOR, "camvid"),
    "segmentor ResNet-18": (PEER, "camvid"),
}
PRETRAINED = ("detector", "segmentor")  # what starts from given weights
ON_TRAINING_IMAGES = (  # the detector's test, on the images that it has learned
    "test_dataloader.dataset.ann_file=annotations/instances_train2017.json",
    "test_dataloader.dataset.data_prefix.img=train2017/",
    "test_evaluator.ann_file={root}/annotations/instances_train2017.json",
)
BOX, MASK, IOU = "bbox_mAP", "segm_mAP", "mIoU"


def main() -> None:
    """Start the runs that were asked for, or, as one of these processes, be one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder with coco_tiny.zip and camvid.zip")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="JSON file; default: benchmarks/dense_h200.json")
    parser.add_argument("--pretrained", help="weights of a vmamba_nano for the detector and the segmentor")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which runs; default: all")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="changes to every config, e.g. train_cfg.max_epochs=1")
    parser.add_argument("--work-dir", type=Path, help="folder for logs and checkpoints; default: a temporary one")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="train for N seconds in place of the configs' schedules; tests follow"
    )
    parser.add_argument("--document", action="store_true", help="fill the section of docs/dense.md from the JSON file")
    parser.add_argument("--single", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.document:
        replace_sections(ROOT / "docs" / "dense.md", {"real images": table(json.loads(args.output.read_text()))})
        return
    if args.data is None:
        parser.error("expected DATA, or --document")
    if args.single:
        args.output.write_text(json.dumps(measure(args.single, args)))
        return
    names = [name for name in args.runs if args.pretrained or name != "segmentor"]  # or it would be that from scratch
    if not names:
        parser.error("--runs segmentor: expected --pretrained WEIGHTS")
    with tempfile.TemporaryDirectory() as scratch:
        args.work_dir = args.work_dir or Path(scratch, "work")
        for archive in {RUNS[name][1] for name in names}:
            with zipfile.ZipFile(args.data / f"{archive}.zip") as file:
                file.extractall(scratch)
        start(names, Path(scratch), args)


def start(names: list[str], scratch: Path, args: argparse.Namespace) -> None:
    """Run all at the same time, wait, and write what they found."""
    import torch

    gpus = torch.cuda.device_count()
    processes = {}
    for number, name in enumerate(names):
        gpu = 0 if gpus < 2 or name == "detector" else 1 + number % (gpus - 1)
        out = scratch / f"{number}.json"
        command = [sys.executable, __file__, str(scratch), "-o", str(out), "--single", name, "--work-dir", str(args.work_dir)]
        command += ["--pretrained", args.pretrained] if args.pretrained and name in PRETRAINED else []
        command += ["--seconds", str(args.seconds)] if args.seconds else []
        command += ["--cfg-options", *args.cfg_options] if args.cfg_options else []
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)} if gpus else os.environ
        processes[name] = (subprocess.Popen(command, env=environment), out)
    for process, _ in processes.values():
        process.wait()
    shared = {"started together": names, "machine": machine()}
    runs = {name: {**json.loads(out.read_text()), **shared} for name, (_, out) in processes.items() if out.exists()}
    earlier = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.write_text(json.dumps({**earlier, **runs}, indent=2) + "\n")
    print(json.dumps(runs, indent=2))
    failed = [name for name, (process, _) in processes.items() if process.returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train and test in this process."""
    import torch
    from time_limit import timed_config

    from visionssm.engine.launch import newest_checkpoint, test, train

    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for every model alike
    config, archive = RUNS[name]
    root = args.data / archive
    work = args.work_dir / name.replace(" ", "-")
    options = [f"data_root={root}", *args.cfg_options]
    if args.pretrained:
        options.append(f"model.backbone.pretrained={args.pretrained}")
    work.mkdir(parents=True, exist_ok=True)
    source = timed_config(config, args.seconds, work) if args.seconds else config
    common = {"config": source, "work_dir": str(work), "cfg_options": options}
    begin = time.perf_counter()
    metrics = train(argparse.Namespace(**common, resume=False, amp=False, compile=False, compile_mode=None))
    seconds = time.perf_counter() - begin
    checkpoint = newest_checkpoint(work)
    meta = torch.load(checkpoint, map_location="cpu", weights_only=False)  # written by this process
    result = {
        "config": config,
        "options": args.cfg_options,
        "seconds of the schedule": args.seconds,
        "pretrained": bool(args.pretrained),
        "parameters": sum(v.numel() for k, v in meta["state_dict"].items() if "running_" not in k),
        "updates": meta["meta"]["iter"],
        "seconds of training and test": round(seconds, 1),
        "test": metrics,
    }
    if name == "detector":
        options = [*options, *(option.format(root=root) for option in ON_TRAINING_IMAGES)]
        learned = argparse.Namespace(**{**common, "cfg_options": options}, checkpoint=checkpoint, tta=False)
        result["test on the training images"] = test(learned)
    return result


def table(results: dict) -> list[str]:
    """The results as lines of Markdown; scores in percent."""
    lines = [
        "| run | parameters, M | updates | training and test, min | box AP, training images | mask AP, training images "
        "| box AP | mask AP | mIoU |",
        "|---|" + "---:|" * 8,
    ]
    for name, run in results.items():
        learned, test = run.get("test on the training images", {}), run["test"]
        scores = [learned.get(BOX), learned.get(MASK), test.get(BOX), test.get(MASK), test.get(IOU)]
        cells = [f"{run['parameters'] / 1e6:.2f}", str(run["updates"]), f"{run['seconds of training and test'] / 60:.1f}"]
        cells += ["" if score is None else f"{score:.1f}" for score in scores]
        lines.append(f"| {name}{', from CIFAR-10' if run['pretrained'] else ''} | {' | '.join(cells)} |")
    return [*lines, "", *dict.fromkeys(measured_on(run) for run in results.values())]


def measured_on(run: dict) -> str:
    """Where a run was measured, and beside which."""
    used, together = run["machine"], run["started together"]
    device = f"{len(used['gpus'])} x {used['gpus'][0]}" if used["gpus"] else "no GPU"
    runs = f"Runs at the same time: {', '.join(together)}" if len(together) > 1 else f"Alone: {together[0]}"
    return f"{runs}; {device}, {used['cores']} cores, torch {used['torch']}."


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    import timm
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


if __name__ == "__main__":
    main()
