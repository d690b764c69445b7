# The peer of upernet_vmamba-nano_camvid: timm's ResNet-18, the same head, recipe and number of updates
_base_ = "upernet_vmamba-nano_camvid.py"

model = dict(
    backbone=dict(model_name="resnet18", out_indices=(1, 2, 3, 4), drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
