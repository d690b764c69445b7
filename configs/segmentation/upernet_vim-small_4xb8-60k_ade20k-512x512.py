# Vim-S taps the residual stream; it was published for the Vim of January 2024, with rotary positions
_base_ = "upernet_vim-tiny_4xb8-60k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", tap="stream"),
    neck=dict(in_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.95))
