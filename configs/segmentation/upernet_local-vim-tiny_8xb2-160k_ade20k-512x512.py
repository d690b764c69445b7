# Every level is a LayerNorm of one layer's mixer output; all have stride 16, and no neck changes that
_base_ = "../_base_/segmentation/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        model_name="local_vim_tiny", out_indices=(4, 9, 14, 19), tap="mixer", out_norm=True, img_size=512, drop_path_rate=0.1
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3),
)
