"""What importing the package does and does not do, each in a fresh process, since an import happens once per process."""

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import visionssm

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("visionssm.ops.kernels", "mmengine", "mmcv", "mmdet", "mmseg", "matplotlib", "cv2")


def python(code, *flags, cwd):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_import_is_silent_and_light(tmp_path):
    code = f"""
import sys, visionssm
loaded = [m for m in sys.modules if m.startswith(tuple(f + "." for f in {FORBIDDEN})) or m in {FORBIDDEN}]
assert not loaded, loaded
before = set(sys.modules)
import visionssm.cli
commands = [m for m in set(sys.modules) - before if m.startswith("visionssm.commands")]
assert not commands, commands
"""
    run = python(code, "-W", "error", cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_and_forward_without_triton(tmp_path):
    """torchvision and timm load Triton where it exists; an entry of None makes every import of it fail."""
    code = """
import sys
sys.modules["triton"] = None
import timm, torch, visionssm
model = timm.create_model("vmamba_nano", depths=(1, 1, 1, 1), num_classes=3).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
"""
    run = python(code, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_ops_alone_and_no_second_copy():
    """From the repository's root `import ops` finds the folder a second time; registering the operators twice is refused."""
    code = """
import visionssm.ops
assert callable(visionssm.ops.cross_selective_scan)
try:
    import ops
except RuntimeError as error:
    print(error)
"""
    run = python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "TORCH_LIBRARY" in run.stdout
    assert "visionssm" in run.stdout


def test_import_by_name_makes_timm_know_the_models(tmp_path):
    """What timm's own train.py does with `--device-modules visionssm`: import by name, then create_model.

    `local-dir:` (and `hf-hub:`) models name their architecture in a config.json; timm has no plug-in discovery, so that name
    is known only after `import visionssm`.
    """
    code = """
import importlib, timm, torch
importlib.import_module("visionssm")
model = timm.create_model("vim_nano", num_classes=3)
timm.models.save_for_hf(model, "saved", safe_serialization=True)
again = timm.create_model("local-dir:saved", pretrained=True)
assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
"""
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = python("import timm; timm.create_model('local-dir:saved', pretrained=True)", cwd=tmp_path)
    assert run.returncode == 1
    assert "RuntimeError: Unknown model (vim_nano)" in run.stderr


def test_version_is_stated_once():
    assert visionssm.__version__ == importlib.metadata.version("visionssm")
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py hands to setuptools."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_packages_hold_everything_under_one_name(setup_arguments):
    packages = setup_arguments["packages"]
    assert {"visionssm", "visionssm.models", "visionssm.ops", "visionssm.ops.kernels", "visionssm.configs"} <= set(packages)
    assert [name for name in packages if name != "visionssm" and not name.startswith("visionssm.")] == []
    assert setup_arguments["package_dir"]["visionssm.ops"] == "ops"


def test_every_folder_of_code_is_packaged(setup_arguments):
    code = {path.parent.relative_to(ROOT / "visionssm") for path in (ROOT / "visionssm").rglob("*.py")}
    code |= {"ops" / path.parent.relative_to(ROOT / "ops") for path in (ROOT / "ops").rglob("*.py")}
    expected = {".".join(("visionssm", *folder.parts)) for folder in code}
    assert expected <= set(setup_arguments["packages"])
