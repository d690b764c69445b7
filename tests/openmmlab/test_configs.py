"""Every config of a detector or segmentor builds, predicts, learns and has the published size; published files fit."""

import copy
import re
from functools import cache

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope

from parity import load_golden
from visionssm.engine.config import load_config
from visionssm.engine.dense import check_channels, check_classes, check_precision
from visionssm.engine.optim import OptimWrapper, OptimWrapperConstructor
from visionssm.errors import UserError
from visionssm.recipes import recipes
from visionssm.weights import checkpoints
from visionssm.weights.convert import to_own_names

CONFIGS = {path.stem: path for path in recipes() if path.parent.name in ("detection", "segmentation")}

# millions of parameters as published; without the auxiliary heads' part they would not fit
PARAMETERS = {
    "mask-rcnn_vanilla-vmamba-tiny_fpn_1x_coco": 42,
    "mask-rcnn_vanilla-vmamba-small_fpn_1x_coco": 64,
    "mask-rcnn_vanilla-vmamba-base_fpn_1x_coco": 96,
    "mask-rcnn_vmamba-tiny-s2l5_fpn_1x_coco": 50,
    "mask-rcnn_vmamba-small-s2l15_fpn_1x_coco": 70,
    "mask-rcnn_vmamba-base-s2l15_fpn_1x_coco": 108,
    "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco": 50,
    "mask-rcnn_local-vmamba-tiny_fpn_1x_coco": 45,
    "mask-rcnn_local-vmamba-small_fpn_1x_coco": 69,
    "mask-rcnn_local-vim-tiny_vitdet_8xb8-lsj-100e_coco": 31,
    "upernet_vanilla-vmamba-tiny_8xb2-160k_ade20k-512x512": 55,
    "upernet_vanilla-vmamba-small_8xb2-160k_ade20k-512x512": 76,
    "upernet_vanilla-vmamba-base_8xb2-160k_ade20k-512x512": 110,
    "upernet_vmamba-tiny-s2l5_8xb2-160k_ade20k-512x512": 62,
    "upernet_vmamba-small-s2l15_8xb2-160k_ade20k-512x512": 82,
    "upernet_vmamba-base-s2l15_8xb2-160k_ade20k-512x512": 122,
    "upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512": 62,
    "upernet_local-vim-tiny_8xb2-160k_ade20k-512x512": 36,
    "upernet_local-vim-small_8xb2-160k_ade20k-512x512": 58,
    "upernet_local-vmamba-tiny_8xb2-160k_ade20k-512x512": 57,
    "upernet_local-vmamba-small_8xb2-160k_ade20k-512x512": 81,
}


@cache
def config(name):
    cfg = load_config(str(CONFIGS[name]))
    cfg.model.backbone.pretrained = False
    return cfg


def build(name, **backbone):
    cfg = copy.deepcopy(config(name))
    cfg.model.backbone.update(backbone)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return cfg, MODELS.build(cfg.model)


def batch(cfg, height=64, width=96, boxes=1, images=2):
    """Images with one object each, or a map of two classes each, in the form that the package's data sets have."""
    inputs = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(images)]
    if cfg.default_scope == "mmseg":
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = []
        for _ in inputs:
            meta = {
                "img_shape": (height, width),
                "ori_shape": (height, width),
                "pad_shape": (height, width),
                "padding_size": [0] * 4,
            }
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, height, width)))
            samples.append(sample)
        return {"inputs": inputs, "data_samples": samples}
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for _ in inputs:
        sample = DetDataSample(metainfo={"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)})
        masks = np.zeros((boxes, height, width), np.uint8)
        masks[:, 8:40, 8:56] = 1
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([[8.0, 8.0, 56.0, 40.0]] * boxes).reshape(-1, 4)),
            labels=torch.zeros(boxes, dtype=torch.long),
            masks=BitmapMasks(masks, height, width),
        )
        sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def check_learning(cfg, model, data):
    """A training step has finite losses and changes the backbone."""
    optim = {key: value for key, value in cfg.optim_wrapper.items() if key not in ("constructor", "paramwise_cfg", "dtype")}
    wrapper = OptimWrapperConstructor(optim, cfg.optim_wrapper.get("paramwise_cfg"))(model)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    losses = model.train().train_step(data, wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    after = model.backbone.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def small(cfg):
    """Fixed sizes of a recipe's padding, made small for a test."""
    preprocessor = cfg.model.data_preprocessor
    if "batch_augments" in preprocessor:
        preprocessor.batch_augments[0].size = (128, 128)
    if preprocessor.get("size"):
        preprocessor.size = (64, 96)


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_predicts_and_learns(name):
    cfg = copy.deepcopy(config(name))
    small(cfg)
    if cfg.model.test_cfg.get("mode") == "slide":
        cfg.model.test_cfg.update(crop_size=(64, 64), stride=(32, 32))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        check_channels(model)
        if name in PARAMETERS:
            assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PARAMETERS[name]
        check_learning(cfg, model, batch(cfg))
        results = model.eval().test_step(batch(cfg))
    assert len(results) == 2
    if cfg.default_scope == "mmseg":
        assert results[0].pred_sem_seg.data.shape == (1, 64, 96)
    else:
        assert results[0].pred_instances.masks.shape[1:] == (64, 96)


# --- published files ----------------------------------------------------------------------------------------------------

DENSE = [row for task in ("detection", "segmentation") for row in checkpoints("*", task)]


def config_of(row):
    """The config that a published detector or segmentor was trained with."""
    short = row.model.replace("_", "-")
    if row.task == "segmentation":
        size = "640x640" if row.tag.endswith("640") else "512x512"
        return f"upernet_{short}_8xb2-160k_ade20k-{size}"
    schedule = {"coco_mask_rcnn_1x": "1x", "coco_mask_rcnn_3x": "ms-crop-3x", "coco_mask_rcnn_1x_bs8": "8xb1-1x"}[row.tag]
    return f"mask-rcnn_{short}_fpn_{schedule}_coco"


def published_names(name, value, generation):
    """Our key of a backbone, as VMamba's code of a time wrote it, and the value in its form."""
    stem = {"patch_embed.conv1": "0", "patch_embed.norm1": "2", "patch_embed.conv2": "5", "patch_embed.norm2": "7"}
    stem |= {"patch_embed.proj": "0", "patch_embed.norm": "2"}
    for ours, index in stem.items():
        name = re.sub(rf"^{re.escape(ours)}\.", f"patch_embed.{index}.", name)
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
    if generation == "v2":
        name = name.replace("downsample.conv.", "downsample.1.").replace("downsample.norm.", "downsample.3.")
    elif generation == "january":
        name = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        name = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", name).replace(".op.", ".self_attention.")
    if name.endswith((".A_logs", ".Ds")):
        value = value.flatten(0, 1)
    return name, value


def published(model, generation):
    """A detector's or segmentor's state dict as a published file has it."""
    out = {}
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            bare, value = published_names(name.removeprefix("backbone."), value, generation)
            name = f"backbone.{bare}"
        out[name] = value
    return out


@pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
def test_a_published_file_fits_its_config(row):
    """Key by key and strictly, backbone, norms and heads, whichever generation of names; its values arrive where they belong."""
    _, model = build(config_of(row))
    for parameter in model.parameters():
        parameter.data.normal_()
    for generation in ("today", "january") if row.model.startswith("vanilla") else ("v2",):
        names = published(model, generation)
        expected = model.state_dict()
        assert ("backbone.layers.0.blocks.0.ln_1.weight" in names) == (generation == "january")
        ours = to_own_names(names, timm.create_model(row.model, num_classes=0, device="meta"))
        assert set(ours) == set(expected)
        model.load_state_dict(ours, strict=True)
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    heads = {name.split(".")[0] for name in ours} - {"backbone"}
    assert heads == ({"neck", "rpn_head", "roi_head"} if row.task == "detection" else {"decode_head", "auxiliary_head"})


RECORDED = [  # config, list of keys recorded from the published code, generation
    ("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", "vmamba_tiny_s1l8", "v2"),
    ("upernet_vmamba-tiny-s2l5_8xb2-160k_ade20k-512x512", "vmamba_tiny_s2l5", "v2"),
    ("mask-rcnn_vanilla-vmamba-tiny_fpn_1x_coco", "vanilla_vmamba_tiny", "today"),
    ("mask-rcnn_vanilla-vmamba-tiny_fpn_1x_coco", "vanilla_vmamba_tiny_published_keys", "january"),
]


@pytest.mark.parametrize(("name", "golden", "generation"), RECORDED)
def test_names_of_a_published_backbone(name, golden, generation):
    """The names and shapes that the tests above take for published are the recorded ones, and four output norms."""
    recorded = {key: tuple(shape) for key, shape in load_golden(golden)["state_dict"]}
    classifier = ("classifier.",) if generation != "january" else ("norm.", "head.")
    recorded = {f"backbone.{key}": shape for key, shape in recorded.items() if not key.startswith(classifier)}
    widths = (96, 192, 384, 768)
    recorded |= {f"backbone.outnorm{i}.{kind}": (width,) for i, width in enumerate(widths) for kind in ("weight", "bias")}
    _, model = build(name)
    ours = {key: tuple(value.shape) for key, value in published(model, generation).items() if key.startswith("backbone.")}
    assert ours == recorded


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"),
        (
            "upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512",
            "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
        ),
    ],
)
def test_heads_are_the_stock_ones(name, stock, tmp_path):
    """All but the backbone has the names and shapes of mmdet's and mmseg's own models; the neck reads other widths."""
    (tmp_path / "stock.py").write_text(f"_base_ = {stock!r}\n")
    cfg = load_config(str(tmp_path / "stock.py"))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        expected = MODELS.build(cfg.model).state_dict()
    _, model = build(name)

    def shapes(state):
        return {key: tuple(v.shape) for key, v in state.items() if not key.startswith(("backbone.", "neck.lateral_convs."))}

    assert shapes(model.state_dict()) == shapes(expected)


# --- sizes, wrong parts ---------------------------------------------------------------------------------------------------

NANO = "mask-rcnn_vmamba-nano_fpn_digit-scenes"
NANO_SEGMENTOR = "upernet_vmamba-nano_digit-scenes"


@pytest.mark.parametrize(
    ("name", "size", "images"),
    [(NANO, (800, 1333), 1), (NANO, (427, 640), 1), (NANO, (333, 201), 2), (NANO_SEGMENTOR, (123, 77), 2)],
)
def test_any_size(name, size, images):
    """COCO's usual sizes, and odd ones: a training step, and predictions of the images' size."""
    cfg, model = build(name)
    if cfg.default_scope == "mmseg":
        model.data_preprocessor.size = size  # to which it pads what it trains on
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_learning(cfg, model, batch(cfg, *size, images=images))
        results = model.eval().test_step(batch(cfg, *size, images=images))
    assert len(results) == images
    for result in results:
        shape = result.pred_sem_seg.data.shape if cfg.default_scope == "mmseg" else result.pred_instances.masks.shape
        assert tuple(shape[1:]) == size


def test_images_without_boxes():
    cfg, model = build(NANO)
    optim = OptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1e-4}})(model)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        losses = model.train().train_step(batch(cfg, boxes=0), optim)
    assert torch.isfinite(losses["loss"])
    assert losses["loss_mask"].item() == 0.0


def dtypes_of_a_step(model, data, modules):
    """The types of what these modules return in a training step in bfloat16; its losses are finite."""
    found = {}
    for module, name in modules.items():
        module.register_forward_hook(lambda _m, _x, y, name=name: found.__setitem__(name, (y[0] if type(y) is tuple else y).dtype))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4), dtype="bfloat16")
    losses = model.train().train_step(data, wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    return found


def test_bfloat16_of_a_detector_is_for_its_backbone():
    """mmcv's operators know none: neck and heads compute in float32; a segmentor's heads in bfloat16."""
    cfg, model = build(NANO)
    block = model.backbone.model.layers[1].blocks[0].op.in_proj
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        found = dtypes_of_a_step(model, batch(cfg), {block: "block", model.backbone: "maps", model.rpn_head.rpn_cls: "head"})
        assert found == {"block": torch.bfloat16, "maps": torch.float32, "head": torch.float32}
        model.eval().test_step(batch(cfg))
    cfg, model = build(NANO_SEGMENTOR)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        found = dtypes_of_a_step(model, batch(cfg), {model.backbone: "maps", model.decode_head.conv_seg: "head"})
    assert found == {"maps": torch.bfloat16, "head": torch.bfloat16}


def test_bfloat16_of_a_detector_without_our_backbone():
    cfg, model = build(NANO)
    ours = {"type": "visionssm.OptimWrapper", "dtype": "bfloat16"}
    check_precision(model, ours)
    with pytest.raises(UserError, match=r"AmpOptimWrapper takes it to them; pass optim_wrapper\.type=visionssm\.OptimWrapper"):
        check_precision(model, {"type": "AmpOptimWrapper", "dtype": "bfloat16"})
    model.backbone = torch.nn.Identity()
    message = r"bfloat16 is for a visionssm\.Backbone.*pass optim_wrapper\.dtype=float16"
    with pytest.raises(UserError, match=message):
        check_precision(model, ours)
    check_precision(model, {**ours, "dtype": "float16"})
    with DefaultScope.overwrite_default_scope(cfg.default_scope), pytest.raises(UserError, match=message):
        dtypes_of_a_step(model, batch(cfg), {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (NANO, {"neck": {"in_channels": [64, 128, 256]}}, r"model.neck.in_channels: got \[64, 128, 256\].*\[96, 128, 128\]"),
        (
            NANO_SEGMENTOR,
            {"decode_head": {"in_channels": [32, 64, 128, 256]}},
            r"model.decode_head.in_channels: got \[32, 64, 128, 256\].*\[64, 96, 128, 128\]",
        ),
        (
            NANO_SEGMENTOR,
            {"auxiliary_head": {"in_channels": 64}},
            r"model.auxiliary_head.in_channels: got 64 at in_index=2.*\[64, 96, 128, 128\]",
        ),
    ],
)
def test_wrong_channels(name, change, message):
    cfg = copy.deepcopy(config(name))
    for part, values in change.items():
        cfg.model[part].update(values)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    with pytest.raises(UserError, match=message):
        check_channels(model)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (NANO, "neck", r"model.neck.0.in_channels: got \[96, 128, 64\]"),
        (NANO_SEGMENTOR, "auxiliary_head", r"model.auxiliary_head.1.*got 64"),
    ],
)
def test_wrong_channels_in_a_list(name, part, message):
    """Necks one after another, of which the first reads the backbone; auxiliary heads side by side."""
    cfg = copy.deepcopy(config(name))
    right = cfg.model[part]
    other = {"type": "BFP", "in_channels": 64, "num_levels": 4} if part == "neck" else right
    wrong = {**right, "in_channels": [96, 128, 64] if part == "neck" else 64}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_channels(MODELS.build({**cfg.model, part: [right, other]}))
        model = MODELS.build({**cfg.model, part: [wrong, other] if part == "neck" else [right, wrong]})
    with pytest.raises(UserError, match=message):
        check_channels(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            NANO,
            {"roi_head": {"bbox_head": {"num_classes": 7}}},
            "model.roi_head.bbox_head.num_classes: got 7, the data has 10",
        ),
        (NANO, {"roi_head": {"mask_head": {"num_classes": 7}}}, "model.roi_head.mask_head.num_classes: got 7"),
        (NANO_SEGMENTOR, {"auxiliary_head": {"num_classes": 7}}, "model.auxiliary_head.num_classes: got 7"),
    ],
)
def test_wrong_number_of_classes(name, change, message):
    cfg = copy.deepcopy(config(name))
    assert any(hook["type"] == "visionssm.ClassCheckHook" for hook in cfg.default_hooks.values())
    classes = {"classes": tuple(map(str, range(10 if name == NANO else cfg.model.decode_head.num_classes)))}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_classes(MODELS.build(cfg.model), classes)
        cfg.merge_from_dict({"model": change})
        model = MODELS.build(cfg.model)
    check_classes(model, {})
    with pytest.raises(UserError, match=message):
        check_classes(model, classes)
