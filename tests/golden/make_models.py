"""Extract the models' golden files from a folder of reference outputs: `python tests/golden/make_models.py FOLDER`.

FOLDER holds `<family>/<variant>.json` and `.npz`, recorded by running the published code on the weights and images of fill.py.
Each model becomes `<model>.json`: published key names and shapes, parameter count, and per case the image size and summaries of
features; all logits go to `models_logits.npz`. Cases that record a known bug of the published code are left out.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RENAMED = {"local_vssm": "local_vmamba", "vim_tiny_plus": "vim_tiny_patch16_stride8_224", "_middle_cls_token": "_midclstok"}
BUGS = ("384_upstream_resize",)


def our_name(variant: str) -> str:
    """The model's name in this zoo (a suffix such as `_published_keys` stays)."""
    if variant == "vim_tiny":
        return "vim_tiny_patch16_224"
    for published, ours in RENAMED.items():
        variant = variant.replace(published, ours)
    return variant


def is_bug(case: dict) -> bool:
    """Whether the case shows published behaviour that we do not follow."""
    height, width = case["image"][1:]
    return case.get("name") in BUGS or (case.get("reverse") == "upstream" and -(-height // 16) != -(-width // 16))


def summaries(features: dict | list, ddof: int) -> dict:
    """Feature name to shape, mean, std (with `ddof`), first and last elements."""
    named = features if isinstance(features, dict) else {f"layers.{i}": f for i, f in enumerate(features)}
    keep = ("shape", "mean", "std", "first8", "last8")
    return {name: {"ddof": ddof, **{k: round_all(f[k]) for k in keep if k in f}} for name, f in named.items()}


def round_all(value: float | list) -> float | list:
    """Nine significant digits: all that float32 has."""
    return (
        [round_all(v) for v in value] if isinstance(value, list) else float(f"{value:.9g}") if isinstance(value, float) else value
    )


def extract(path: Path, logits: dict[str, np.ndarray]) -> dict:
    """One model's golden record; its logits are added to `logits`."""
    source, arrays, name = json.loads(path.read_text()), np.load(path.with_suffix(".npz")), our_name(path.stem)
    cases = []
    for case in source["cases"]:
        if is_bug(case):
            continue
        label = case.get("name") or "x".join(map(str, case["image"]))
        key = case.get("logits") if isinstance(case.get("logits"), str) else case.get("npz_key", f"{label}.logits")
        if key in arrays:
            logits[f"{name}/{label}"] = arrays[key].astype(np.float32)
        features = summaries(case.get("features", {}), ddof=int(path.parent.name == "localmamba"))
        outputs = summaries(case.get("outputs", []), ddof=1)
        cases.append({"name": label, "image": case["image"], "features": features, "outputs": outputs})
    record = {
        "model": name,
        "parameters": source.get("parameters", source.get("params")),
        "state_dict": source["state_dict"],
        "cases": cases,
    }
    if "backbone" in source:  # the dense wrapper: the same network with one more norm per stage and without the classifier
        dense = source["backbone"]
        record["dense"] = {
            "extra_state_dict": dense["extra_state_dict"],
            "cases": [{"image": case["image"], "outputs": summaries(case["outputs"], ddof=0)} for case in dense["cases"]],
        }
    return record


def main() -> None:
    logits: dict[str, np.ndarray] = {}
    for family in ("vim", "vmamba", "localmamba"):
        for path in sorted(Path(sys.argv[1], family).glob("*.json")):
            if "state_dict" not in json.loads(path.read_text()):
                continue
            record = extract(path, logits)
            (HERE / f"{record['model']}.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
            print(record["model"], [case["name"] for case in record["cases"]])
    np.savez_compressed(HERE / "models_logits.npz", **logits)


if __name__ == "__main__":
    main()
