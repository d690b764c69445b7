# ViTDet's training (arXiv 2203.16527): large-scale jitter to 1024 x 1024, 184,375 updates of 64 images, 100 epochs of COCO
_base_ = "mmdet::common/lsj-100e_coco-instance.py"

image_size = (1024, 1024)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8, num_workers=8, sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True), dataset=dict(times=1)
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=184375, val_interval=5000)
optim_wrapper = dict(
    _delete_=True,
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(decay=("A_logs",)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=184375, milestones=[163889, 177546], gamma=0.1),
]
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000),
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    randomness=dict(type="visionssm.RandomnessHook"),
    progress=dict(type="visionssm.ProgressHook"),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
