# `make demo-detection`: a small Mask R-CNN on scenes of handwritten digits, from scratch, on a CPU
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/datasets/digit-scenes-detection.py",
    "../_base_/runtimes/detection.py",
]

model = dict(
    backbone=dict(_delete_=True, type="visionssm.Backbone", model_name="vmamba_nano", out_indices=(1, 2, 3), pretrained=False),
    neck=dict(in_channels=[96, 128, 128], out_channels=64, num_outs=4, norm_cfg=dict(type="GN", num_groups=16)),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16]),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16]),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)), rpn_proposal=dict(nms_pre=400, max_per_img=100), rcnn=dict(sampler=dict(num=48))
    ),
    test_cfg=dict(rpn=dict(nms_pre=400, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=5)
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True),
]
# every tenth test image with boxes and masks, the true ones to the left
default_hooks = dict(visualization=dict(draw=True, interval=10, score_thr=0.5, test_out_dir="pictures"))
