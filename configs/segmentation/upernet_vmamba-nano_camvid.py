# A nano segmentor, 4000 updates. From the weights of a classifier: --cfg-options model.backbone.pretrained=path/to/epoch_100.pth
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/datasets/camvid.py",
    "../_base_/runtimes/segmentation.py",
]

model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}, seg_pad_val={{_base_.void}}),
    backbone=dict(
        _delete_=True,
        type="visionssm.Backbone",
        model_name="vmamba_nano",
        out_indices=(0, 1, 2, 3),
        pretrained=False,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[64, 96, 128, 128], channels=128, num_classes=11, ignore_index={{_base_.void}}),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=11, ignore_index={{_base_.void}}),
)

train_cfg = dict(max_iters=4000, val_interval=1000)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(_delete_=True, max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=200, end=4000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=4000))
