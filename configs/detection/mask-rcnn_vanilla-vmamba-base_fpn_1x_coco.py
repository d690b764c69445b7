_base_ = "../_base_/detection/mask-rcnn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_base", drop_path_rate=0.2, pretrained="vanilla_vmamba_base.in1k_dp05"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

# 16 processes with one image each
train_dataloader = dict(batch_size=1)
