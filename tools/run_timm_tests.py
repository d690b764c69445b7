"""Run timm's own test file, tests/test_models.py of its source distribution, on our models.

    python tools/run_timm_tests.py [--models 'vim_*'] [--sdist timm-1.0.31.tar.gz]

The file is taken from the source distribution of the installed timm, downloaded once. Its edits, each checked: `visionssm` is
imported first, our modules replace the list of those with `forward_intermediates`, our token models join timm's list of models
without a 4-D feature map, `list_models` is limited to our models, and every time limit obeys the environment variable TIMEOUT
(seconds, for a slow machine). Every test that timm runs on each of its models then runs on each of ours, but for those that
download weights or need TorchScript. The tests collected are compared with the tests expected; a skipped test counts as a failure.
"""

import argparse
import fnmatch
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

import visionssm  # noqa: F401

OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("visionssm.")]
MODULES = sorted({timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name in OURS})
TOKEN_MODELS = ("vim_*", "local_vim_*")  # (batch, L, C) features, as timm's vit_*
ALL_MODELS_TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
)
LEFT_OUT = {
    "test_model_inference": "downloads weights",
    "test_model_load_pretrained": "downloads weights",
    "test_model_features_pretrained": "downloads weights",
    "test_model_forward_torchscript": "TorchScript",
    "test_model_forward_fx_torchscript": "TorchScript",
}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Collect, compare with what is expected, run, report; exit status 1 unless every test passed."""
    args = _parse_args()
    models = fnmatch.filter(OURS, args.models)
    if not models:
        sys.exit(f"--models: no model of ours matches {args.models!r}")
    source = _edited(_read_test_file(args.sdist or _download(ROOT / "work_dirs" / "timm")), models)
    with tempfile.TemporaryDirectory(prefix="timm_tests_") as folder:
        Path(folder, "test_models.py").write_text(source)
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        tests = _collect(folder)
        chosen = {t for t in tests if t[1].split(".")[0] in models and t[0] not in LEFT_OUT}
        _check_collected(chosen, _expected(models))
        print(f"timm {timm.__version__}: {len(chosen)} tests of {len(models)} models collected, as expected", flush=True)
        start = time.monotonic()
        results = _run(folder, [tests[t] for t in sorted(chosen)])
    outcome = ", ".join(f"{n} {name}" for name, n in results.items() if n)
    print(f"timm {timm.__version__}: {outcome} of {len(chosen)} tests on {len(models)} models in {time.monotonic() - start:.0f} s")
    sys.exit(0 if results["passed"] == len(chosen) else 1)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="*", metavar="PATTERN", help="only models whose names match, as in 'vim_*'")
    parser.add_argument("--sdist", type=Path, help="timm's source distribution, in place of downloading it")
    return parser.parse_args()


def _download(folder: Path) -> Path:
    """The installed timm's source distribution, from the package index unless it is already in `folder`."""
    path = folder / f"timm-{timm.__version__}.tar.gz"
    if not path.exists():
        release = f"timm=={timm.__version__}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm", "--dest", str(folder), release],
            check=True,
        )
    return path


def _read_test_file(sdist: Path) -> str:
    if not sdist.is_file():
        sys.exit(f"{sdist}: no such file")
    member = f"timm-{timm.__version__}/tests/test_models.py"
    with tarfile.open(sdist) as archive:
        if member not in archive.getnames():
            sys.exit(f"{sdist}: holds no {member}; it must be the source distribution of the installed timm {timm.__version__}")
        return archive.extractfile(member).read().decode()


def _edited(source: str, models: list[str]) -> str:
    """The test file, made to test `models`."""
    limited = (
        "\n\n_OURS = " + repr(set(models)) + "\n_list_all_models = list_models\n\n\n"
        "def list_models(*args, **kwargs):\n"
        "    return [name for name in _list_all_models(*args, **kwargs) if name.split('.')[0] in _OURS]\n\n"
    )
    edits = (
        (r"\A", "import visionssm\n"),
        (r"^FEAT_INTER_FILTERS = \[[^]]*\]", f"FEAT_INTER_FILTERS = {MODULES}"),
        (r"^NON_STD_FILTERS = \[", f"NON_STD_FILTERS = {list(TOKEN_MODELS)} + ["),
        (r"^from timm import list_models, .*$", r"\g<0>" + limited),
    )
    for pattern, replacement in edits:
        source, count = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"timm {timm.__version__}: tests/test_models.py has {count} places, not one, to edit that match {pattern!r}")
    if "timeout120 = " not in source:
        sys.exit(f"timm {timm.__version__}: tests/test_models.py has no timeout120, the limit that TIMEOUT raises")
    return source.replace("timeout(120)", "timeout(timeout120)")


def _pytest(folder: str, *arguments: str) -> subprocess.CompletedProcess:
    capture = subprocess.PIPE if "--collect-only" in arguments else None
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--disable-warnings", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "130"}, stdout=capture, text=True)


def _collect(folder: str) -> dict[tuple[str, str], str]:
    """(function, model) to pytest's id, of every collected test that is parametrised with one of our models."""
    collected = _pytest(folder, "--collect-only", "test_models.py")
    if collected.returncode:
        sys.exit(f"timm's test file could not be collected:\n{collected.stdout}")
    ids = re.findall(r"^(test_models\.py::(\w+)\[(.*)\])$", collected.stdout, flags=re.MULTILINE)
    return {(function, re.sub(r"^\d+-", "", parameters)): node for node, function, parameters in ids}


def _expected(models: list[str]) -> set[tuple[str, str]]:
    """(function, model) of every test that timm should run on `models`: 9 on one with maps, 8 on one with tokens."""
    expected = {(function, model) for function in ALL_MODELS_TESTS for model in models}
    for model in models:
        is_token_model = any(fnmatch.fnmatch(model, pattern) for pattern in TOKEN_MODELS)
        config_test = "test_model_default_cfgs_non_std" if is_token_model else "test_model_default_cfgs"
        expected |= {(config_test, tagged) for tagged in timm.list_models(model, include_tags=True)}
        if not is_token_model:
            expected.add(("test_model_forward_features", model))
    return expected


def _check_collected(collected: set[tuple[str, str]], expected: set[tuple[str, str]]) -> None:
    differences = [f"missing: {f}[{m}]" for f, m in sorted(expected - collected)]
    differences += [f"not expected: {f}[{m}]" for f, m in sorted(collected - expected)]
    if differences:
        shown = "\n  ".join(differences[:20])
        sys.exit(f"timm {timm.__version__}: {len(collected)} tests collected, {len(expected)} expected\n  {shown}")


def _run(folder: str, ids: list[str]) -> dict[str, int]:
    """Run the tests and count their outcomes."""
    report = Path(folder, "report.xml")
    _pytest(folder, "--durations=5", f"--junitxml={report}", *ids)
    if not report.exists():
        sys.exit("pytest ended without a report")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(key)) for name, key in (("failed", "failures"), ("errors", "errors"), ("skipped", "skipped"))}
    return {"passed": int(suite.get("tests")) - sum(counts.values()), **counts}


if __name__ == "__main__":
    main()
