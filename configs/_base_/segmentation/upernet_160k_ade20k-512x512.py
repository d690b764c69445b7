# UPerNet, 160,000 updates of 16 images: the recipe of mmseg's Swin-T, which VMamba and LocalMamba follow
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionssm.Backbone",
        model_name="vmamba_tiny_s1l8",
        out_indices=(0, 1, 2, 3),
        pretrained=True,
        drop_path_rate=0.2,
    )
)
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, no_decay=("*norm*", "*pos_embed", "*cls_token")),
)
default_hooks = dict(
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    randomness=dict(type="visionssm.RandomnessHook"),
    progress=dict(type="visionssm.ProgressHook"),
)
randomness = dict(seed=0)
