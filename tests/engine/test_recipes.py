"""Every recipe: its model, parameter groups, schedule and augmentation, against numbers from the publications."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS

from visionssm.engine import Runner
from visionssm.engine.config import load_config
from visionssm.engine.launch import main_train
from visionssm.engine.optim import OptimWrapper
from visionssm.recipes import recipes

EPOCH = 2  # iterations of an epoch in these tests


@dataclass(frozen=True)
class Recipe:
    """What is published, or chosen, of one training; learning rates are those of the published number of images per update."""

    model: str
    drop_path: float
    weight_decay: float
    batch: int = 128
    epochs: int = 300
    warmup: int = 5
    first: float = 1e-6
    lr: float = 1e-3
    last: float = 1e-5
    ema: float | None = 0.9999
    clip: float | None = None
    dtype: str | None = None
    mixup: float = 0.8
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    repeats: int = 1
    seed: int = 0
    initial_weights: str | None = None
    decayed: tuple[str, ...] = ("A_logs",)


def vim(model, drop_path, weight_decay, **changes):
    return Recipe(model, drop_path, weight_decay, **{"ema": 0.99996, "repeats": 3, **changes})


def plus(model):
    return vim(
        f"{model}_patch16_stride8_224",
        0.0,
        1e-8,
        epochs=30,
        warmup=0,
        first=1e-5,
        lr=1e-5,
        last=1e-5,
        initial_weights=f"{model}_patch16_224",
    )


def vmamba(model, drop_path, **changes):
    constants = {"warmup": 20, "clip": 5.0, "dtype": "float16", "decayed": ("A_logs", "dt_projs_bias")}
    return Recipe(model, drop_path, 0.05, **{**constants, **changes})


def local(model, drop_path, **changes):
    constants = {"warmup": 20, "first": 1e-7, "last": 1e-6, "mixup": 0.2, "rand_augment": "rand-m9-mstd0.5", "seed": 42}
    return Recipe(model, drop_path, 0.04, **{**constants, **changes})


def local_vmamba(model):
    return local(model, 0.2, clip=1.0, dtype="float16", decayed=("A_logs", "dt_projs_bias"))


PUBLISHED = {
    "vim-tiny_8xb128-300e_in1k": vim("vim_tiny_patch16_224", 0.0, 0.1),
    "vim-small_8xb64-300e_in1k": vim("vim_small_patch16_224", 0.05, 0.05, batch=64),
    "vim-base_8xb128-300e_in1k": vim("vim_base_patch16_224", 0.3, 0.05),
    "vim-tiny-stride8_8xb128-30e_in1k": plus("vim_tiny"),
    "vim-small-stride8_8xb128-30e_in1k": plus("vim_small"),
    "vmamba-tiny-s1l8_8xb128-300e_in1k": vmamba("vmamba_tiny_s1l8", 0.2),
    "vmamba-small-s1l20_8xb128-300e_in1k": vmamba("vmamba_small_s1l20", 0.3),
    "vmamba-base-s1l20_8xb128-300e_in1k": vmamba("vmamba_base_s1l20", 0.5),
    "vmamba-tiny-s2l5_8xb128-300e_in1k": vmamba("vmamba_tiny_s2l5", 0.2),
    "vmamba-small-s2l15_8xb128-300e_in1k": vmamba("vmamba_small_s2l15", 0.3),
    "vmamba-base-s2l15_8xb128-300e_in1k": vmamba("vmamba_base_s2l15", 0.6),
    "vmamba-tiny-0220_8xb128-300e_in1k": vmamba("vmamba_tiny_0220", 0.2),
    "vanilla-vmamba-tiny_8xb128-300e_in1k": vmamba("vanilla_vmamba_tiny", 0.2, ema=None),
    "vanilla-vmamba-small_8xb128-300e_in1k": vmamba("vanilla_vmamba_small", 0.3),
    "vanilla-vmamba-base_8xb128-300e_in1k": vmamba("vanilla_vmamba_base", 0.6),
    "local-vim-tiny_8xb128-300e_in1k": local("local_vim_tiny", 0.1),
    "local-vim-tiny-midclstok_8xb128-300e_in1k": local("local_vim_tiny_midclstok", 0.1),
    "local-vim-small_8xb128-300e_in1k": local("local_vim_small", 0.1),
    "local-vmamba-tiny_8xb128-300e_in1k": local_vmamba("local_vmamba_tiny"),
    "local-vmamba-small_8xb128-300e_in1k": local_vmamba("local_vmamba_small"),
}
NAMES = pytest.mark.parametrize("name", PUBLISHED)


def test_every_published_model_has_a_recipe():
    zoo = {name for name in timm.list_models(module=["vim", "vmamba", "local_vim", "local_vmamba"]) if "nano" not in name}
    assert {recipe.model for recipe in PUBLISHED.values()} == zoo
    assert {path.stem for path in recipes() if path.stem.endswith("_in1k") and "-search_" not in path.stem} == set(PUBLISHED)


def on_meta(cfg):
    with torch.device("meta"):
        return MODELS.build(cfg.model)


def build_optimizer(cfg, model):
    """The optimizer as on a GPU: this machine may have none, so the precision is left out."""
    wrapper = cfg.optim_wrapper.copy()
    dtype = wrapper.pop("dtype", None)
    build = OPTIM_WRAPPER_CONSTRUCTORS.get(wrapper.pop("constructor"))
    return dtype, build(wrapper, wrapper.pop("paramwise_cfg"))(model)


def rates(cfg, optim_wrapper):
    """The learning rate of every iteration of a training whose epochs have `EPOCH` iterations."""
    schedulers = []
    for scheduler in cfg.param_scheduler or ():
        args = dict(scheduler, optimizer=optim_wrapper, by_epoch=True)
        if args.get("end", -1) == -1:
            args["end"] = cfg.train_cfg.max_epochs
        convert = args.pop("convert_to_iter_based", False)
        if convert:
            cls = PARAM_SCHEDULERS.get(args.pop("type"))
            schedulers.append(cls.build_iter_from_epoch(epoch_length=EPOCH, **args))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(args))
    found = []
    for iteration in range(cfg.train_cfg.max_epochs * EPOCH):
        found.append(optim_wrapper.optimizer.param_groups[0]["lr"])
        optim_wrapper.step()  # changes nothing: there is no gradient
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % EPOCH == 0:
                scheduler.step()
    return found


@NAMES
def test_model_and_optimizer(name):
    want, cfg = PUBLISHED[name], load_config(name)
    assert cfg.model.backbone.model_name == want.model
    assert cfg.model.get("initial_weights") == want.initial_weights
    model = on_meta(cfg)
    assert model.num_classes == 1000
    dropped = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(dropped, default=0.0) == pytest.approx(want.drop_path)

    dtype, wrapper = build_optimizer(cfg, model)
    assert dtype == want.dtype
    assert (wrapper.clip_grad_kwargs or {}).get("max_norm") == want.clip
    assert type(wrapper.optimizer) is torch.optim.AdamW
    groups = {group["weight_decay"]: group for group in wrapper.optimizer.param_groups}
    assert set(groups) == {0.0, want.weight_decay}
    assert all(group["eps"] == 1e-8 and tuple(group["betas"]) == (0.9, 0.999) for group in groups.values())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[want.weight_decay]["params"]}
    assert len(names) == sum(len(group["params"]) for group in groups.values())
    for parameter, path in ((p, names[id(p)]) for p in model.parameters()):
        ending = path.rsplit(".", 1)[-1]
        if ending in ("A_logs", "dt_projs_bias"):
            assert (path in decayed) == (ending in want.decayed), path
        elif parameter.ndim == 1 or ending in ("bias", "Ds", "conv1d_bias", "pos_embed", "cls_token"):
            assert path not in decayed, path
        else:
            assert path in decayed, path


@NAMES
def test_schedule(name):
    want, cfg = PUBLISHED[name], load_config(name)
    assert cfg.train_cfg.max_epochs == want.epochs
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    wrapper = OptimWrapper(optimizer)

    def scaled(world_size, counts=1):
        wrapper._accumulative_counts = counts
        optimizer.param_groups[0]["lr"] = cfg.optim_wrapper.optimizer.lr
        log = SimpleNamespace(info=lambda _: None)
        runner = SimpleNamespace(world_size=world_size, _train_dataloader=cfg.train_dataloader, logger=log)
        Runner.scale_lr(runner, wrapper, cfg.auto_scale_lr)
        return optimizer.param_groups[0]["lr"]

    assert cfg.train_dataloader.batch_size == want.batch
    constant = want.lr == want.last
    assert scaled(1) == pytest.approx(want.lr if constant else want.lr / 8)
    assert scaled(2, 4) == pytest.approx(want.lr)
    assert scaled(8) == pytest.approx(want.lr)
    found = rates(cfg, wrapper)
    assert found[0] == pytest.approx(want.first)
    warm = want.warmup * EPOCH
    assert found[: warm + 1] == sorted(found[: warm + 1])
    assert found[warm] == pytest.approx(want.lr)
    assert found[warm:] == sorted(found[warm:], reverse=True)
    assert found[warm + (len(found) - warm) // 2] == pytest.approx((want.lr + want.last) / 2)
    assert found[-1] == pytest.approx(want.last, rel=0.02)
    if name.startswith("local"):  # constant within an epoch of the warm-up
        assert found[3 * EPOCH] == found[4 * EPOCH - 1] == pytest.approx(want.first + 3 / 20 * (want.lr - want.first))


@NAMES
def test_data_and_hooks(name):
    want, cfg = PUBLISHED[name], load_config(name)
    assert cfg.model.label_smoothing == 0.1
    assert cfg.model.mixup == {"mixup_alpha": want.mixup, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}
    assert cfg.model.random_erasing == {"probability": 0.25, "mode": "pixel", "max_count": 1}
    loader = cfg.train_dataloader
    assert loader.dataset.transform.auto_augment == want.rand_augment
    assert loader.dataset.transform.interpolation == "bicubic"
    assert loader.dataset.input_size == 224
    repeats = loader.sampler.num_repeats if loader.sampler.type == "visionssm.RepeatedAugmentation" else 1
    assert repeats == want.repeats
    assert loader.drop_last
    assert (224 / cfg.test_dataloader.dataset.transform.crop_pct, cfg.test_dataloader.dataset.transform.interpolation) == (
        256,
        "bicubic",
    )
    averages = [hook.decay for hook in cfg.custom_hooks if hook.type == "visionssm.EMAHook"]
    assert averages == ([] if want.ema is None else [want.ema])
    assert cfg.randomness.seed == want.seed


SHORT = [
    "input_size=32",
    "model.backbone.num_classes=2",
    "train_dataloader.batch_size=4",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "test_dataloader.num_workers=0",
    "test_dataloader.dataset.split=test",
]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("vim-tiny_8xb128-300e_in1k", "vim_nano"),
        ("local-vmamba-tiny_8xb128-300e_in1k", "local_vmamba_nano"),
    ],
)
def test_a_recipe_runs_from_its_first_to_its_last_epoch(name, model, photographs, tmp_path, capsys):
    """With a nano, twelve images and two epochs; the precision that needs a GPU is bfloat16 here."""
    precision = ["optim_wrapper.dtype=bfloat16"] if "mamba" in name else []
    options = [f"data_root={photographs}", f"model.backbone.model_name={model}", "model.backbone.drop_path_rate=0.1", *precision]
    options += [*SHORT, "train_cfg.max_epochs=2", "param_scheduler.0.end=1", "param_scheduler.1.begin=1"]
    assert main_train([name, "--work-dir", str(tmp_path), "--cfg-options", *options]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "epoch 2/2  val top1" in out
    assert "top-5: 100.0 %" in out
    averaged = "ema_state_dict" in torch.load(tmp_path / "epoch_2.pth", weights_only=False)  # the file was written by this test
    assert averaged


def test_a_training_shorter_than_its_warmup(capsys):
    assert main_train(["vmamba-tiny-s1l8_8xb128-300e_in1k", "--cfg-options", "train_cfg.max_epochs=5"]) == 1
    message = "train_cfg.max_epochs: got 5, expected more than 20, where CosineAnnealingLR begins"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("data", "kind"), [("wds", "visionssm.ImageStream"), ("hfds", "visionssm.HubImages")])
def test_the_same_recipe_from_shards_or_from_the_hub(data, kind):
    name = "vmamba-tiny-s1l8_8xb128-300e_in1k"
    plain, cfg = load_config(name), load_config(f"{name}-{data}")
    for key in ("model", "optim_wrapper", "param_scheduler", "auto_scale_lr", "custom_hooks", "train_cfg"):
        assert cfg[key] == plain[key]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert cfg[loader].dataset.type == kind
        assert cfg[loader].dataset.transform == plain[loader].dataset.transform
        assert cfg[loader].batch_size == 128
        assert (cfg[loader].sampler is None) == (data == "wds")
    assert cfg.train_dataloader.dataset.split == "train"
    assert cfg.test_dataloader.dataset.split == "validation"
