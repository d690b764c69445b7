# A nano detector that learns 80 images by heart: a check of the whole chain, not a detector to use. From scratch, 2400 updates.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco-tiny.py",
    "../_base_/runtimes/detection.py",
]

model = dict(
    # stages of strides 4, 8 and 16; the neck adds 32 and 64
    backbone=dict(
        _delete_=True, type="visionssm.Backbone", model_name="vmamba_nano", out_indices=(1, 2, 3), pretrained=False, with_cp=False
    ),
    neck=dict(in_channels=[96, 128, 128], out_channels=128, norm_cfg=dict(type="GN", num_groups=32)),
    rpn_head=dict(in_channels=128, feat_channels=128),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128),
        mask_roi_extractor=dict(out_channels=128),
        mask_head=dict(in_channels=128, conv_out_channels=128, num_convs=2),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=256))),
)

# 8 epochs of 30 x 80 images
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=8)
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=8, convert_to_iter_based=True),
]
