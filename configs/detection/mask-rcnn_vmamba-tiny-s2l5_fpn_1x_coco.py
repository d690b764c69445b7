_base_ = "../_base_/detection/mask-rcnn_1x_coco.py"

model = dict(backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2))
