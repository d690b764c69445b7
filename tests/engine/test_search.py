"""The search for scan directions: its super-net, decoding, and training what was found."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from golden.fill import fill
from golden.ops_golden import Golden
from visionssm import config_path
from visionssm.engine import DirectionSearch, ImageClassifier, OptimWrapperConstructor
from visionssm.engine.config import load_config
from visionssm.engine.launch import main_train
from visionssm.engine.search import DIRECTIONS, WeightedBiAttn, decode_directions
from visionssm.errors import UserError
from visionssm.layers.local_mixer import BiAttn
from visionssm.layers.ss2d import SS2D

TOOL = Path(__file__).parents[2] / "tools" / "decode_directions.py"


def test_merge_of_the_super_net():
    """By the definition: attention, a norm without parameters, shares from a softmax."""
    attn = BiAttn(16)
    merge = WeightedBiAttn(attn, 8)
    y = torch.randn(2, 8, 3, 5, 16)
    expected = 0
    for k in range(8):
        position_mean = F.layer_norm(y[:, k], (16,), attn.norm.weight, attn.norm.bias, 1e-5).mean((1, 2), keepdim=True)
        factor = attn.channel_select(F.gelu(attn.global_reduce(position_mean))).sigmoid()
        share = merge.direction_weights.flatten().softmax(0)[k]
        expected = expected + share * F.layer_norm(y[:, k] * factor, (16,), eps=1e-5)
    torch.testing.assert_close(merge(y), expected)


def test_mixer_of_the_super_net_is_the_published_one():
    golden, name = Golden("local"), "supernet_ss2d_7x7"
    (case,) = (case for case in golden.cases if case["name"] == name)
    mixer = SS2D(32, 16, 2.0, DIRECTIONS, gate=True, conv_bias=True, scan_attn=BiAttn)
    mixer.scan_attn = WeightedBiAttn(mixer.scan_attn, len(DIRECTIONS))
    renamed = {"multi_scan.weights": "scan_attn.direction_weights"}
    state = {}
    for published, shape in case["state_dict"]:
        key = renamed.get(published, published.replace("multi_scan.attn.", "scan_attn."))
        state[key] = torch.from_numpy(fill(published, shape)).reshape(mixer.get_parameter(key).shape)
    mixer.load_state_dict(state)
    with torch.no_grad():
        out = mixer(torch.from_numpy(golden.inputs(name)["in"]))
    golden.compare(name, {"out": out.numpy()}, 1e-5)


@pytest.mark.parametrize("name", ["local_vim_nano", "local_vmamba_nano"])
def test_all_directions_run_and_learn(name):
    model = DirectionSearch({"model_name": name, "num_classes": 10, "embed_dim": 32 if "vim" in name else (16, 32, 64, 96)})
    losses = model(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), mode="loss")
    losses["loss"].backward()
    found = {name: p for name, p in model.named_parameters() if name.endswith("direction_weights")}
    assert len(found) == len(decode_directions(model.state_dict()))
    assert all(p.shape == (8, 1, 1, 1) and p.grad.abs().sum() > 0 for p in found.values())
    build = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.04}})
    decayed = {id(p) for group in build(model).optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in found.values()} <= decayed


def test_decoding_keeps_four_in_their_order():
    weights = torch.tensor([0.1, 0.9, -1.0, 0.3, 0.2, 0.8, 0.0, 0.7]).view(8, 1, 1, 1)
    state = {"backbone.layers.0.mixer.attn.direction_weights": weights, "backbone.layers.1.mixer.attn.direction_weights": -weights}
    assert decode_directions(state) == [("h_flip", "v_flip", "w2_flip", "w7_flip"), ("h", "v", "w2", "w7")]
    with pytest.raises(UserError, match="not of a direction search"):
        decode_directions({"backbone.head.weight": weights})
    with pytest.raises(UserError, match="vmamba_nano has no directions to search for"):
        DirectionSearch({"model_name": "vmamba_nano"})


@pytest.mark.parametrize(
    ("name", "model", "widths", "layers"),
    [
        ("local-vim-search_8xb128-100e_in1k", "local_vim_tiny", [128] * 20, 20),
        ("local-vmamba-tiny-search_8xb128-100e_in1k", "local_vmamba_tiny", [32] * 2 + [64] * 2 + [128] * 9 + [256] * 2, 15),
        ("local-vmamba-small-search_8xb128-100e_in1k", "local_vmamba_small", [32] * 2 + [64] * 2 + [128] * 27 + [256] * 2, 33),
    ],
)
def test_search_recipes(name, model, widths, layers):
    cfg = load_config(name)
    assert cfg.model.backbone.model_name == model
    assert cfg.model.backbone.drop_path_rate == 0.1
    assert cfg.train_cfg.max_epochs == 100
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-3, 0.04)
    with torch.device("meta"):
        net = MODELS.build(cfg.model)
    merges = [module for module in net.modules() if isinstance(module, WeightedBiAttn)]
    assert [merge.norm.normalized_shape[0] for merge in merges] == [2 * width for width in widths]
    assert len(merges) == layers
    assert net.num_classes == 1000


def test_from_a_search_to_a_training(tmp_path, monkeypatch, capsys):
    search = tmp_path / "search.py"
    search.write_text(
        f"_base_ = {str(config_path('vmamba-nano_digits'))!r}\n"
        "model = dict(type='visionssm.DirectionSearch', backbone=dict(model_name='local_vim_nano'))\n"
        "train_cfg = dict(max_epochs=1)\n"
        "train_dataloader = dict(batch_size=4, num_batch_per_epoch=2)\n"
        "val_dataloader = dict(batch_size=4, num_batch_per_epoch=1)\n"
        "test_dataloader = dict(batch_size=4, num_batch_per_epoch=1)\n"
        "custom_hooks = [dict(type='visionssm.DirectionsHook', interval=2)]\n"
    )
    assert main_train([str(search), "--work-dir", str(tmp_path / "work")]) == 0
    found = tmp_path / "found.py"
    command = [str(TOOL), str(tmp_path / "work" / "epoch_1.pth"), "vmamba-nano_digits", "-o", str(found)]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    runpy.run_path(str(TOOL), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 9
    (log,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    (row,) = [row for row in map(json.loads, log.read_text().splitlines()) if "directions/0/h" in row]
    assert row["step"] == 2
    for layer in range(8):
        shares = torch.tensor([row[f"directions/{layer}/{name}"] for name in DIRECTIONS])
        assert shares.sum().item() == pytest.approx(1)
        assert (shares - 0.125).abs().max() > 0
    cfg = load_config(str(found), {"model.backbone.model_name": "local_vim_nano"})
    trained = torch.load(tmp_path / "work" / "epoch_1.pth", weights_only=False)["state_dict"]  # written by this test
    model = MODELS.build(cfg.model)
    assert isinstance(model, ImageClassifier)
    assert [layer.mixer.paths for layer in model.backbone.layers] == decode_directions(trained)
    assert all(set(layer.mixer.paths) <= set(DIRECTIONS) for layer in model.backbone.layers)
