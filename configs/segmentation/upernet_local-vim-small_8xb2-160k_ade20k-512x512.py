# The published config names a LocalVMamba's file as its initial weights; of this model none was released
_base_ = "upernet_local-vim-tiny_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="local_vim_small", pretrained=False),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
