# `make demo-segmentation`: a small UPerNet on scenes of handwritten digits, from scratch, on a CPU
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/datasets/digit-scenes-segmentation.py",
    "../_base_/runtimes/segmentation.py",
]

norm = dict(_delete_=True, type="GN", num_groups=8)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(_delete_=True, type="visionssm.Backbone", model_name="vmamba_nano", out_indices=(0, 1, 2, 3), pretrained=False),
    decode_head=dict(in_channels=[64, 96, 128, 128], channels=64, num_classes=2, norm_cfg=norm),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=2, norm_cfg=norm),
)

train_cfg = dict(max_iters=200, val_interval=1000)
val_cfg = None
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.01), clip_grad=dict(_delete_=True, max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=30, end=200, by_epoch=False),
]
# every tenth test image with its classes drawn over it, the true ones to the left
default_hooks = dict(checkpoint=dict(interval=200), visualization=dict(draw=True, interval=10))
