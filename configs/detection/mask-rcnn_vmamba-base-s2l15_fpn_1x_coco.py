_base_ = "../_base_/detection/mask-rcnn_1x_coco.py"

model = dict(backbone=dict(model_name="vmamba_base_s2l15", drop_path_rate=0.6), neck=dict(in_channels=[128, 256, 512, 1024]))
