# Vim-Ti taps the mixers. The published layer decay reached the embeddings alone, as its rule named no layer of Vim; here all.
_base_ = "../_base_/segmentation/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vim_tiny_patch16_224", out_indices=(5, 11, 17, 23), tap="mixer", img_size=512, drop_path_rate=0.1),
    neck=dict(type="visionssm.ResamplingNeck", in_channels=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=8, num_workers=8)
train_cfg = dict(max_iters=60000, val_interval=6000)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1), paramwise_cfg=dict(_delete_=True, decay=("A_logs",), layer_decay=0.92)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=6000))
