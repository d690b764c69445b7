"""Saving in Hugging Face's layout and back, through a folder and through a hub that is a folder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import _hub, load_state_dict, push_to_hf_hub, save_for_hf
from torch import nn

import visionssm

NANOS = ("vim_nano", "vmamba_nano", "local_vim_nano", "local_vmamba_nano")
TINY = {"depths": (1, 1, 1, 1), "embed_dim": 16}
CUSTOM = [  # arguments that change the architecture, each family's own kinds among them
    ("vim_nano", {"img_size": (48, 32), "patch_size": 8, "stride": 4, "depth": 2, "global_pool": "avg"}),
    ("vmamba_nano", {**TINY, "d_state": 2, "gate": True, "mlp_ratio": 0.0, "paths": ("h", "v_flip")}),
    ("local_vim_nano", {"img_size": (48, 40), "depth": 2, "paths": (("h", "w3"), ("v", "v_flip")), "rope_grid": 3}),
    ("local_vim_nano", {"class_token": True, "global_pool": "token", "rope_grid": 0}),
    ("local_vmamba_nano", {**TINY, "paths": (("h", "w3"),) * 4}),
    ("vanilla_vmamba_tiny", TINY),
    ("vmamba_tiny_0220", TINY),
]
nanos = pytest.mark.parametrize("name", NANOS)


def trained(name, **kwargs):
    """A model whose parameters all differ from those of a fresh one."""
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reload(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def config(folder):
    return json.loads((folder / "config.json").read_text())


@torch.inference_mode()
def assert_same(model, again, size=(40, 48)):
    images = torch.randn(2, model.in_chans, *size)
    assert torch.equal(model(images), again(images))


# --- a folder -----------------------------------------------------------------------------------------------------------


@nanos
@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 10}, {"in_chans": 1, "num_classes": 3}, {"num_classes": 0}])
def test_folder(name, kwargs, tmp_path):
    model = trained(name, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = reload(tmp_path)
    assert_same(model, again)
    assert (again.num_classes, again.in_chans) == (model.num_classes, model.in_chans)
    written = config(tmp_path)
    assert written["architecture"] == name
    assert written["num_classes"] == written["pretrained_cfg"]["num_classes"] == model.num_classes
    assert written["num_features"] == model.num_features
    assert written["pretrained_cfg"]["input_size"] == [model.in_chans, 32, 32]
    assert written["pretrained_cfg"]["crop_pct"] == 1.0
    assert len(written["pretrained_cfg"]["mean"]) == model.in_chans


@pytest.mark.parametrize(("name", "kwargs"), CUSTOM)
def test_arguments_of_the_factory_are_kept(name, kwargs, tmp_path):
    model = trained(name, num_classes=5, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert config(tmp_path)["model_args"].items() >= json.loads(json.dumps(kwargs)).items()
    assert_same(model, reload(tmp_path))


def test_arguments_given_when_saving(tmp_path):
    """A model that no factory of timm's has built: what differs from the architecture's defaults is said here."""
    paths = [["h", "v"]] * 4
    model = visionssm.models.VMamba(patch_size=2, embed_dim=(64, 96, 128, 128), depths=(1, 1, 1, 1), paths=paths, num_classes=4)
    model.pretrained_cfg = timm.create_model("vmamba_nano", device="meta").pretrained_cfg
    save_for_hf(model.eval(), tmp_path, model_args={"depths": (1, 1, 1, 1), "paths": paths}, safe_serialization=True)
    assert_same(model, reload(tmp_path))


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_either_format(safe, tmp_path):
    """PyTorch's own file holds tensors alone, which `weights_only` reads."""
    model = trained("vmamba_nano", **TINY)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    files = {path.name for path in tmp_path.iterdir()} - {"config.json"}
    expected = {"model.safetensors": (True, "both"), "pytorch_model.bin": (False, "both")}
    assert files == {file for file, modes in expected.items() if safe in modes}
    for file in files:
        assert load_state_dict(tmp_path / file, weights_only=True).keys() == model.state_dict().keys()
    assert_same(model, reload(tmp_path))


@nanos
def test_new_head(name, tmp_path):
    """A fine-tuned model: the head of `reset_classifier` is what counts."""
    model = trained(name)
    model.reset_classifier(7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert config(tmp_path)["model_args"]["num_classes"] == 7
    assert_same(model, reload(tmp_path))


@pytest.mark.parametrize("name", ["vim_nano", "local_vim_nano"])
def test_resized_positions(name, tmp_path):
    """After `set_input_size` the file has more positions; the config says for which image."""
    model = trained(name)
    model.set_input_size((64, 40))
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert config(tmp_path)["model_args"]["img_size"] == [64, 40]
    again = reload(tmp_path)
    assert torch.equal(again.pos_embed, model.pos_embed)
    assert_same(model, again)


@pytest.mark.parametrize("name", ["vim_nano", "local_vim_nano"])
def test_positions_for_another_image_when_loading(name, tmp_path):
    model = trained(name)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = reload(tmp_path, img_size=(64, 40))
    model.set_input_size((64, 40))
    torch.testing.assert_close(again.pos_embed, model.pos_embed)


@nanos
def test_other_head_channels_and_features_when_loading(name, tmp_path):
    """What timm offers on loading: another number of classes, grey images, features."""
    model = trained(name)
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = reload(tmp_path, num_classes=6)
    classifier = model.pretrained_cfg["classifier"]
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(classifier)}
    assert all(torch.equal(other.state_dict()[k], v) for k, v in kept.items())
    assert other.num_classes == 6

    grey = reload(tmp_path, in_chans=1)
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    torch.testing.assert_close(grey.state_dict()[first], model.state_dict()[first].sum(1, keepdim=True))

    images = torch.randn(1, 3, 32, 32)
    features = reload(tmp_path, features_only=True)
    with torch.inference_mode():
        expected = model.forward_intermediates(images, features.feature_info.out_indices, intermediates_only=True)
        for feature, map_ in zip(features(images), expected, strict=True):
            assert torch.equal(feature, map_)


def test_labels_and_preprocessing(tmp_path):
    model = trained("vmamba_nano", num_classes=2)
    save_for_hf(
        model,
        tmp_path,
        model_config={"label_names": ["cat", "dog"]},
        data_config={"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"},
        safe_serialization=True,
    )
    again = reload(tmp_path)
    assert again.pretrained_cfg["label_names"] == ["cat", "dog"]
    data = timm.data.resolve_model_data_config(again)
    assert (tuple(data["mean"]), tuple(data["std"]), data["interpolation"]) == ((0.5,) * 3, (0.25,) * 3, "bilinear")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    save_for_hf(trained("vmamba_nano"), tmp_path, safe_serialization=True)
    written = config(tmp_path)
    written["model_args"]["ssm_ratio"] = 1.5
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0\.blocks\.0\.op"):
        reload(tmp_path)


# --- a hub ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub's four calls that timm makes, on a folder instead of the network."""

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=kwargs["exist_ok"])
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, **kwargs):
            return (tmp_path / repo_id / filename).exists()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, **kwargs):
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise _hub.EntryNotFoundError(f"no {filename}", response=SimpleNamespace(headers={}, request=None))
        return str(path)

    monkeypatch.setattr(_hub, "HfApi", Api)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    return tmp_path


@pytest.mark.parametrize(("name", "kwargs"), [*((name, {"num_classes": 10, "in_chans": 1}) for name in NANOS), *CUSTOM[1:3]])
def test_hub(name, kwargs, hub):
    model = trained(name, **kwargs)
    push_to_hf_hub(model, "somebody/digits", model_card={"description": "Digits."})
    page = (hub / "somebody" / "digits" / "README.md").read_text()
    assert "library_name: timm" in page
    again = timm.create_model("hf-hub:somebody/digits", pretrained=True).eval()
    assert_same(model, again)
    assert again.pretrained_cfg["hf_hub_id"] == "somebody/digits"
    untrained = timm.create_model("hf-hub:somebody/digits").eval()
    assert [*untrained.state_dict()] == [*model.state_dict()]
    assert not torch.equal(next(untrained.parameters()), next(model.parameters()))


def test_pushing_again_replaces_the_weights_and_keeps_the_page(hub):
    push_to_hf_hub(trained("vmamba_nano", **TINY), "somebody/digits")
    page = hub / "somebody" / "digits" / "README.md"
    page.write_text("mine")
    model = trained("vmamba_nano", **TINY)
    nn.init.constant_(model.get_classifier().bias, 3.0)
    push_to_hf_hub(model, "somebody/digits")
    assert page.read_text() == "mine"
    assert_same(model, timm.create_model("hf-hub:somebody/digits", pretrained=True).eval())
