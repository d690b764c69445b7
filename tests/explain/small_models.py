"""Small models of every family, with weights that make attention large enough to see."""

import timm
import torch

import visionssm  # noqa: F401

# One model for every kind of scan: (name, arguments, image size). All grids are non-square, most need padding.
MODELS = {
    "vim": ("vim_nano", {"depth": 2}, (20, 28)),
    "vmamba": ("vmamba_nano", {"depths": (1, 1), "embed_dim": (16, 24)}, (13, 18)),
    "vanilla_vmamba": ("vanilla_vmamba_tiny", {"depths": (1, 1), "embed_dim": (16, 24), "d_state": 3}, (20, 28)),
    "local_vim": ("local_vim_nano", {"depth": 2, "paths": (("w2", "v_flip", "w7_flip"), ("h", "w2_flip", "v"))}, (20, 28)),
    "local_vim_cls": (
        "local_vim_nano",
        {"depth": 1, "paths": (("w2", "h_flip", "w2_flip", "v"),), "class_token": True, "rope_grid": 0, "global_pool": "token"},
        (20, 28),
    ),
    "local_vmamba": (
        "local_vmamba_nano",
        {"depths": (1, 1), "embed_dim": (16, 24), "paths": (("w2", "v_flip", "h"), ("w2_flip", "v", "w7"))},
        (10, 14),
    ),
}


def build(kind, dtype=torch.float64, batch=2):
    """A model of `MODELS` and images for it, the same at every call."""
    name, arguments, size = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # fresh steps are so small that a scan would hardly read another token
            if key.endswith("dt_projs_bias"):
                parameter.normal_(-1.0, 0.5)
            elif key.endswith(("x_proj_weight", "conv1d_bias", "conv2d.bias", "out_norm.weight", "Ds", "in_proj.weight")):
                parameter.normal_(0.0, 0.5)
    return model, torch.randn(batch, 3, *size, dtype=dtype)
