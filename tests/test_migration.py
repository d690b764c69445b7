"""What docs/migration.md says is true: names, code, commands, arguments and every key of its tables."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import visionssm
from golden.fill import fill
from golden.ops_golden import Golden
from parity import check_feature, images, load_golden, published_weights
from visionssm import registry
from visionssm.cli import main
from visionssm.flops import count_flops
from visionssm.models import VMamba
from visionssm.ops.paths import parse_path
from visionssm.weights import checkpoints

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
PUBLISHED = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("visionssm.") and "nano" not in n}


def section(title, level):
    """The text under a heading, down to the next of its level or above."""
    start = PAGE.index(f"\n{'#' * level} {title}\n")
    rest = PAGE[start + 1 :].split("\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", rest, flags=re.MULTILINE)[0]


def rows(text):
    """The cells of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i - 1 for i, line in enumerate(lines) if line.startswith("|---")}
    return [
        [cell.strip() for cell in lines[i].strip("|").split("|")]
        for i in range(len(lines))
        if i not in heads | {h + 1 for h in heads}
    ]


def words(cell):
    return re.findall(r"`([^`]+)`", cell)


# --- names --------------------------------------------------------------------------------------------------------------


def test_every_published_model_has_its_row():
    here = [words(row[-1]) for row in rows(section("Models", 2))]
    assert all(len(names) == 1 for names in here)
    assert sorted(names[0] for names in here) == sorted(PUBLISHED)


@pytest.mark.parametrize("family", ["VMamba", "Vim", "LocalMamba"])
def test_files_are_those_of_the_table_of_weights(family):
    """Also that a model without a file has none there."""
    for *_, file, here in rows(section(family, 3)):
        known = [row for row in checkpoints(f"{words(here)[0]}.*", "classification", status=None) if row.status == "available"]
        names = {row.url.rsplit("/", 1)[-1]: row for row in known}
        if file.startswith("none"):
            assert not known, here
        else:
            assert words(file)[0] in names, here


def test_configs_are_those_of_the_table_of_weights():
    for _, config, file, here in rows(section("VMamba", 3)):
        row = next(row for row in checkpoints(f"{words(here)[0]}.*") if row.url.endswith(words(file)[0]))
        assert row.config.endswith(f"{words(config)[0]}.yaml")


def test_modules_named_exist():
    """Dotted names, paths and the functions behind them."""
    for name in set(re.findall(r"`(visionssm\.[\w.]+)", PAGE)) - {"visionssm.Backbone"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    assert registry.MODELS.get("visionssm.Backbone").__name__ == "Backbone"
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).exists()


def test_arguments_exist():
    """Every `name=value` and every bare name in the last column is VMamba's, or a method of every model."""
    known = set(inspect.signature(VMamba).parameters)
    for there, here in rows(section("Arguments", 2)):
        if here == "the same":
            assert set(words(there)) <= known
        for word in words(here):
            if word.startswith("model."):
                assert hasattr(VMamba, re.match(r"model\.(\w+)\(", word)[1])
            elif re.match(r"\w+=", word):
                assert set(re.findall(r"(\w+)=", word)) <= known
            elif word not in ("ConvStem", "ConvDownsample", "ceil(d / 16)"):
                assert word in known


@pytest.mark.parametrize(
    "arguments", sorted({word for row in rows(section("Arguments", 2)) for word in words(row[1]) if "paths=" in word})
)
def test_scan_orders(arguments):
    model = eval(f"VMamba({arguments}, depths=(1, 1, 1, 1), embed_dim=16, num_classes=2)", {"VMamba": VMamba})
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2)


def test_words_of_the_paths():
    row = next(row for row in rows(section("Operators", 2)) if row[1].startswith("the same words"))
    for word in words(row[0]) + words(row[1]):
        parse_path(word)


@pytest.mark.parametrize(("name", "figure"), [("local_vim_tiny", 2.16), ("vim_tiny_patch16_224", 1.83)])
def test_flops(name, figure):
    assert round(count_flops(timm.create_model(name, device="meta")).macs / 1e9, 2) == figure
    assert f"{figure} G by this rule" in PAGE


# --- code ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the examples name, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    named = {
        "vssm1_tiny_0230s_ckpt_epoch_264.pth": lambda weights: {"model": weights, "epoch": 264},
        "mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth": lambda weights: {"meta": {}, "state_dict": detector(weights)},
        "single_file.pth": single_file,
    }

    def make(text):
        for file, content in named.items():
            if file in text:
                torch.save(content(published_weights("vmamba_tiny_s1l8")), file)

    return make


def detector(weights):
    extra = load_golden("vmamba_tiny_s1l8")["dense"]["extra_state_dict"]
    norms = {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in extra}
    backbone = {k: v for k, v in weights.items() if not k.startswith("classifier.")} | norms
    return {f"backbone.{k}": v for k, v in backbone.items()} | {"rpn_head.rpn_conv.weight": torch.zeros(1)}


def single_file(weights):
    """(4, out, in) -> (4 out, in), under a linear layer's name."""
    names = {".x_proj_weight": ".x_proj.weight", ".dt_projs_weight": ".dt_projs.weight"}
    out = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            if key.endswith(ours):
                key, value = key.replace(ours, theirs), value.flatten(0, 1)
        out[key] = value
    return out


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_code_runs(code, files):
    files(code)
    scope = {}
    exec(code, scope)
    check = CHECKS.get(next((name for name in CHECKS if name in scope), None))
    if check:
        check(scope)


def check_vanilla(scope):
    """The example of arguments is the registered model."""
    expected = timm.create_model("vanilla_vmamba_tiny", device="meta").state_dict()
    own = scope["model"].state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in expected.items()}


def check_cross_scan(scope):
    """The example's functions give what the published ones gave, gradients too."""
    golden = Golden("cross")
    cases = [case for case in golden.cases if case["in_channel_first"] and case["out_channel_first"] and not case["one_by_one"]]
    assert cases
    for case in cases:
        inputs = {name: torch.from_numpy(array) for name, array in golden.inputs(case["tag"]).items()}
        x, ys = inputs["scan_x"].requires_grad_(), inputs["merge_ys"].requires_grad_()
        xs = scope["cross_scan_fn"](x)
        merged = scope["cross_merge_fn"](ys.flatten(3), case["H"], case["W"])
        ((xs * inputs["scan_w"]).sum() + (merged * inputs["merge_w"]).sum()).backward()
        results = {"scan_y": xs.detach(), "scan_dx": x.grad, "merge_out": merged.detach(), "merge_dys": ys.grad}
        golden.compare(case["tag"], {name: value.numpy() for name, value in results.items()}, 1e-6)


def check_unsearched(scope):
    for name in ("local_vim_tiny_wo_search", "local_vim_small_as_registered"):
        assert {layer.mixer.paths for layer in scope[name].layers} == {("h", "h_flip", "w2", "w2_flip")}


def check_single_file(scope):
    expected = timm.create_model("vmamba_tiny_s1l8")
    visionssm.load_checkpoint(expected, {"model": published_weights("vmamba_tiny_s1l8")})
    own = scope["model"].state_dict()
    assert all(torch.equal(own[k], v) for k, v in expected.state_dict().items())


@torch.inference_mode()
def check_dense(scope):
    """Model and norms of the example give the maps of the published backbone."""
    for case in load_golden("vmamba_tiny_s1l8")["dense"]["cases"]:
        maps = scope["model"].eval().forward_intermediates(images(case), intermediates_only=True)
        outputs = [norm(feature) for norm, feature in zip(scope["norms"], maps, strict=True)]
        for output, (stage, summary) in zip(outputs, case["outputs"].items(), strict=True):
            check_feature("vmamba_tiny_s1l8", {"name": "with outnorms"}, stage, output, summary)


CHECKS = {
    "PatchStem": check_vanilla,
    "cross_scan_fn": check_cross_scan,
    "unsearched": check_unsearched,
    "from_single_file": check_single_file,
    "outputs": check_dense,
}


def test_checks_found_their_code():
    assert all(sum(name in code for code in PYTHON) == 1 for name in CHECKS)


# --- keys ---------------------------------------------------------------------------------------------------------------

KEY_TABLES = [  # heading, model, recorded key list
    ("VMamba, 0220 and later", "vmamba_tiny_s1l8", "vmamba_tiny_s1l8"),
    ("VMamba, 0220 and later", "vmamba_tiny_0220", "vmamba_tiny_0220"),
    ("Vanilla VMamba, names of today", "vanilla_vmamba_tiny", "vanilla_vmamba_tiny"),
    ("Vanilla VMamba, names of January 2024", "vanilla_vmamba_tiny", "vanilla_vmamba_tiny_published_keys"),
    ("Vim", "vim_tiny_patch16_224", "vim_tiny_patch16_224"),
    ("LocalVim", "local_vim_tiny", "local_vim_tiny"),
    ("LocalVim", "local_vim_tiny_midclstok", "local_vim_tiny_midclstok"),
    ("LocalVMamba", "local_vmamba_tiny", "local_vmamba_tiny"),
]


def braces(key):
    """`a.{x,y}` -> a.x, a.y"""
    match = re.search(r"\{([^}]+)\}", key)
    return [key[: match.start()] + word + key[match.end() :] for word in match[1].split(",")] if match else [key]


def key_pairs(heading):
    text = section("Key names", 2)
    text = re.split(r"^### ", text[text.index(f"### {heading}\n") + 4 :], flags=re.MULTILINE)[0]
    return [pair for there, here in rows(text) for pair in zip(braces(words(there)[0]), braces(words(here)[0]), strict=True)]


def as_in_the_table(key):
    """A key of any layer, stage or direction as the tables write it."""
    key = re.sub(r"^layers\.\d+\.(blocks)\.\d+", r"layers.0.\1.0", key)
    key = re.sub(r"^layers\.\d+\.(mixer|norm|downsample)", r"layers.0.\1", key)
    return re.sub(r"(A_log|D|conv1d|x_proj|dt_proj)_[0-3]", r"\1_2", key)


@pytest.mark.parametrize(("heading", "model", "golden"), KEY_TABLES)
def test_keys(heading, model, golden):
    """Every row holds through the filter, and every published key that does not stay as it is has one."""
    net = timm.create_model(model, device="meta")
    family = importlib.import_module(type(net).__module__)
    published = published_weights(golden)
    ours = family.checkpoint_filter_fn(dict(published), net)
    pairs = key_pairs(heading)
    for there, here in pairs:
        key, index = re.fullmatch(r"([^\[]+)(?:\[(\d)\])?", here).groups()
        value = ours[key] if index is None else ours[key][int(index)]
        assert torch.equal(value.flatten(), published[there].flatten()), (there, here)
    moved = {key for key, value in published.items() if key not in ours or ours[key].shape != value.shape}
    moved = {as_in_the_table(key) for key in moved if not key.startswith("rope.")}
    assert moved == {there for there, _ in pairs if there in published}, heading
    assert len(pairs) == len({there for there, _ in pairs})


def test_shapes_in_the_tables():
    """(4 E, N) and (4, E, N) of the decay rates and skips."""
    for heading in ("VMamba, 0220 and later", "Vanilla VMamba, names of today", "LocalVMamba"):
        text = section("Key names", 2).split(f"### {heading}\n")[1].split("###")[0]
        assert text.count("(4 E, N)") == text.count("(4, E, N)") == text.count("(4 E)") == text.count("(4, E)") == 1
    published = {key: tuple(shape) for key, shape in load_golden("vmamba_tiny_s1l8")["state_dict"]}
    ours = timm.create_model("vmamba_tiny_s1l8", device="meta").state_dict()
    for name, there, here in (("A_logs", (4 * 96, 1), (4, 96, 1)), ("Ds", (4 * 96,), (4, 96))):
        assert (published[f"layers.0.blocks.0.op.{name}"], ours[f"layers.0.blocks.0.op.{name}"].shape) == (there, here)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "local_vmamba_tiny"])
def test_four_dimensional_linears_and_prefixes(name):
    model = timm.create_model(name)
    weights = published_weights(name)
    linear = (".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight", "classifier.head.weight")
    wrapped = {f"module.module.{k}": v[..., None, None] if k.endswith(linear) else v for k, v in weights.items()}
    visionssm.load_checkpoint(model, {"state_dict": wrapped})
    assert torch.equal(model.get_classifier().weight, weights["classifier.head.weight"])


def test_vim_of_january_is_refused_by_name():
    weights = published_weights("vim_tiny_patch16_224") | {"rope.freqs_cos": torch.zeros(196, 192)}
    with pytest.raises(ValueError, match="rope"):
        visionssm.load_checkpoint(timm.create_model("vim_tiny_patch16_224"), weights)


# --- commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()])
def test_commands_run(line, files, capsys):
    files("vssm1_tiny_0230s_ckpt_epoch_264.pth")
    program, *argv = shlex.split(line.replace("FILE", "vssm1_tiny_0230s_ckpt_epoch_264.pth"))
    assert program == "visionssm"
    assert main(argv) == 0, capsys.readouterr().err
    if "-o" in argv:
        assert Path(argv[argv.index("-o") + 1]).stat().st_size > 100e6
