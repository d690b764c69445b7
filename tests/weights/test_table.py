"""The table of checkpoints, timm's configs, the model cards and the README say the same."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm

import visionssm  # noqa: F401
from visionssm.errors import UserError
from visionssm.weights import checkpoints, find
from visionssm.weights.table import STATUSES

ROOT = Path(__file__).parents[2]
EVERY = checkpoints(status=None)
ROWS = [row for row in EVERY if not row.shipped_file]  # others' files; test_shipped.py has ours
OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("visionssm.")]


def test_the_table_is_whole():
    assert len(ROWS) == 43
    assert len({row.name for row in ROWS}) == len(ROWS)
    urls = [url for row in ROWS for url in (row.url, *row.other_urls) if url]
    assert len(set(urls)) == len(urls)
    for row in ROWS:
        assert row.status in STATUSES
        assert row.model in OURS or (row.model is None and row.status == "unsupported")
        assert (row.url is None) == (row.status in ("mislinked", "unreleased"))
        assert row.notes or row.status == "available"
        assert row.reported
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
        assert row.origin.origin.startswith("https://github.com/")
        assert row.origin.license
        if row.url:
            assert urlsplit(row.url).scheme in ("https", "hf")
            assert urlsplit(row.url).netloc in ("github.com", "hustvl")


def test_known_traps_are_told():
    assert "LocalVMamba-S" in " ".join(checkpoints("local_vim_small.in1k", status=None)[0].notes)
    assert "Never released" in checkpoints("local_vmamba_tiny.in1k", status=None)[0].notes[0]
    assert "no EMA" in find("vanilla_vmamba_base.in1k_dp05").notes[0]
    assert find("vim_base_patch16_224").entry == "model_ema"
    assert "Non-commercial" in find("vim_tiny_patch16_224").origin.license_note


def test_timm_configs_are_the_tables():
    for row in ROWS:
        if row.task != "classification" or row.status != "available":
            continue
        cfg = timm.get_pretrained_cfg(row.name)
        assert cfg.tag == row.tag
        if row.url.startswith("hf://"):
            assert row.url == f"hf://{cfg.hf_hub_id}/{cfg.hf_hub_filename}"
        else:
            assert cfg.url == row.url
        assert cfg.license == row.origin.license
        assert cfg.origin_url == row.origin.origin
        assert cfg.paper_ids == row.origin.paper
        assert cfg.paper_name == row.origin.title
        assert cfg.input_size[-1] == row.reported["input"]
    listed = {name for name in timm.list_pretrained() if name.split(".")[0] in OURS}
    assert listed == {row.name for row in checkpoints(task="classification")}
    assert timm.get_pretrained_cfg("vanilla_vmamba_base").tag == "in1k"  # the better of two is the default


def test_readme_reports_what_the_table_does():
    readme = (ROOT / "README.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \| [\d,]+ \| ([\d.]+) \| \d+ \|$", readme, flags=re.MULTILINE))
    best = {}
    for row in ROWS:
        if row.task == "classification" and row.model:
            best.setdefault(row.model, str(row.reported["top1"]))
    assert shown == best


def test_model_cards_are_up_to_date():
    command = [sys.executable, str(ROOT / "tools" / "make_model_cards.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_card_has_a_readable_head():
    yaml = pytest.importorskip("yaml")
    for row in EVERY:
        text = (ROOT / "model_cards" / f"{row.name}.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["library_name"] == "timm"
        values = {metric["value"] for metric in head["model-index"][0]["results"][0]["metrics"]}
        assert values
        assert values <= set(row.reported.values())
        assert row.url is None or row.shipped_file or row.url in text
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert {model["Name"] for model in index["Models"]} == {row.name for row in ROWS if row.status == "available"}


def test_card_heads_pass_the_hubs_own_reader():
    from huggingface_hub import ModelCard

    for row in EVERY:
        data = ModelCard.load(ROOT / "model_cards" / f"{row.name}.md").data
        assert data.eval_results[0].metric_value in row.reported.values()


def test_find():
    assert find("vmamba_tiny_s1l8") == find("vmamba_tiny_s1l8.in1k")
    for name, message in (
        ("vmamba_tiny_s1l9", "is called 'vmamba_tiny_s1l9'; did you mean vmamba_tiny_s1l8.in1k"),
        ("vmamba_tiny_s1l8.coco", "its model has vmamba_tiny_s1l8.in1k, vmamba_tiny_s1l8.coco_mask_rcnn_1x"),
        ("vmamba*", "is called 'vmamba*'"),
        ("vmamba_nano.in1k", "no published checkpoint is called 'vmamba_nano.in1k'"),
        ("", "no published checkpoint is called ''"),
        ("local_vim_small", "local_vim_small.in1k is mislinked: "),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            find(name)
