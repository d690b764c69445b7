"""Extract the golden files of the operator tests, `ops_*.npz` beside this script, from a folder of reference outputs.

    python tests/golden/make_ops.py REFERENCE [--out FOLDER] [--whole]

REFERENCE holds what the published implementations computed: vmamba/ops_selective_scan.npz, vmamba/ops_cross.npz,
vmamba/ops_ss2d.npz, vim/ops.npz, localmamba/scan_permutations.npz, localmamba/mixer_cases.npz and the .json files beside them.
Inputs are stored exactly (as float32 where that loses nothing), each distinct array once; results as digests (ops_golden.py).
Of the largest cases a slice is kept whose results depend on that slice alone.

With --whole nothing is sliced and every element of a result is kept: the complete comparison, too large for the repository, is

    python tests/golden/make_ops.py REFERENCE --out FOLDER --whole
    VISIONSSM_GOLDEN=FOLDER pytest tests/ops/test_golden.py tests/ops/test_golden_mixers.py
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ops_golden import BLOCK, digest

Case = dict[str, np.ndarray]


class Extract:
    """The arrays of one golden file: inputs as `case/name` or a reference to an equal array, results as `case/name~`."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.arrays: Case = {}
        self.same_as: dict[str, str] = {}
        self._seen: dict[tuple, str] = {}

    def input(self, key: str, array: np.ndarray) -> None:
        narrow = array.astype(np.float32) if array.dtype == np.float64 else array
        array = narrow if np.array_equal(narrow, array) else array
        first = self._seen.setdefault((array.shape, array.dtype, array.tobytes()), key)
        if first == key:
            self.arrays[key] = array
        else:
            self.same_as[key] = first

    def result(self, key: str, array: np.ndarray) -> None:
        self.arrays[f"{key}~"] = digest(array, 1 if self.whole else BLOCK)

    def save(self, path: Path, cases: object) -> None:
        facts = json.dumps({"cases": cases, "same_as": self.same_as})
        np.savez_compressed(path, facts=np.array(facts), **self.arrays)
        print(f"{path}: {path.stat().st_size} bytes")


def read(path: Path, separator: str) -> dict[str, Case]:
    """The cases of an npz file whose keys are `<case><separator><name>`."""
    cases: dict[str, Case] = {}
    with np.load(path) as archive:
        for key in archive.files:
            case, name = key.split(separator, 1)
            cases.setdefault(case, {})[name] = archive[key]
    return cases


def selective_scan(reference: Path, extract: Extract) -> list:
    cases = {record["name"]: record for record in json.loads((reference / "vmamba/ops.json").read_text())["selective_scan"]}
    for case, arrays in read(reference / "vmamba/ops_selective_scan.npz", "/").items():
        if case == "n1_k4_long" and not extract.whole:  # groups do not mix: the last one alone
            arrays = _last_group(arrays, groups=4)
        for name, array in arrays.items():
            is_result = name in ("y", "last_state") or (name.startswith("d") and name[1:] in arrays)
            (extract.result if is_result else extract.input)(f"{case}/{name}", array)
    return [{"name": name, "delta_softplus": record["delta_softplus"]} for name, record in cases.items()]


def _last_group(arrays: Case, groups: int) -> Case:
    """The last group's channels (the first axis of A, D and delta_bias, the second of the rest) and its B and C."""
    return {name: np.split(array, groups, axis=1 if array.ndim > 2 else 0)[-1] for name, array in arrays.items()}


def vim(reference: Path, extract: Extract) -> list:
    cases = read(reference / "vim/ops.npz", ".")
    for case, arrays in cases.items():
        for name, array in arrays.items():
            is_result = name in ("out", "last_state", "alpha", "alpha_gated_with_D") or name.startswith("grad.")
            (extract.result if is_result else extract.input)(f"{case}/{name}", array)
    return list(cases)


def cross(reference: Path, extract: Extract) -> list:
    """Four-way cross-scan and cross-merge alone (scans = 0)."""
    records = [r for r in json.loads((reference / "vmamba/ops.json").read_text())["cross"] if r["scans"] == 0]
    arrays = read(reference / "vmamba/ops_cross.npz", "/")
    for record in records:
        case = arrays[record["tag"]]
        for name in ("scan_x", "scan_w", "merge_ys", "merge_w"):
            extract.input(f"{record['tag']}/{name}", case[name])
        for name in ("scan_y", "scan_dx", "merge_out", "merge_dys"):
            extract.result(f"{record['tag']}/{name}", case[name])
    return [{k: r[k] for k in ("tag", "in_channel_first", "out_channel_first", "one_by_one", "H", "W")} for r in records]


SS2D_TYPES = ("v0", "v03", "v05", "v3")  # one function, gated or not; the other types are ablations


def ss2d(reference: Path, extract: Extract) -> list:
    records = json.loads((reference / "vmamba/ops_ss2d.json").read_text())["cases"]
    records = [r for r in records if r["result"] == "ok" and r["forward_type"].removesuffix("_noz") in SS2D_TYPES]
    arrays = read(reference / "vmamba/ops_ss2d.npz", "/")
    for record in records:
        for name, array in arrays[record["tag"]].items():
            (extract.input if name in ("x", "w") else extract.result)(f"{record['tag']}/{name}", array)
    return [{k: r[k] for k in ("tag", "forward_type", "channel_first", "state_dict")} for r in records]


def local(reference: Path, extract: Extract) -> list:
    records = json.loads((reference / "localmamba/mixer_cases.json").read_text())
    for case, arrays in read(reference / "localmamba/mixer_cases.npz", "/").items():
        kept = slice(None) if extract.whole or "14x14" not in case else slice(1)  # samples do not mix: the first one alone
        extract.input(f"{case}/in", arrays["in"][kept])
        extract.result(f"{case}/out", arrays["out"][kept])
    return [{"name": name} | {k: r[k] for k in ("directions", "grid", "state_dict") if k in r} for name, r in records.items()]


def paths(reference: Path, extract: Extract) -> list:
    """All tables in one array: `cases` lists [pattern, height, width, steps], each followed by its inverse of H * W entries."""
    tables, cases = [], []
    with np.load(reference / "localmamba/scan_permutations.npz") as archive:
        for key in archive.files:
            kind, pattern, size = key.split("/")
            if kind == "scan":
                height, width = map(int, size.split("x"))
                tables += [archive[key], archive[f"reverse_true/{pattern}/{size}"]]
                cases.append([pattern, height, width, len(archive[key])])
    extract.arrays["tables"] = np.concatenate(tables).astype(np.int16)
    return cases


FILES: dict[str, Callable[[Path, Extract], list]] = {
    "selective_scan": selective_scan,
    "vim": vim,
    "cross": cross,
    "ss2d": ss2d,
    "local": local,
    "paths": paths,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        extract = Extract(options.whole)
        cases = make(options.reference, extract)
        extract.save(options.out / f"ops_{name}.npz", cases)


if __name__ == "__main__":
    main()
