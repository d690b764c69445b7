# Mask R-CNN with FPN, 12 epochs: the recipe of mmdet's Swin-T, which VMamba and LocalMamba follow
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

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
    paramwise_cfg=dict(_delete_=True, no_decay=("*norm*",)),
)
default_hooks = dict(
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    randomness=dict(type="visionssm.RandomnessHook"),
    progress=dict(type="visionssm.ProgressHook"),
)
randomness = dict(seed=0)
