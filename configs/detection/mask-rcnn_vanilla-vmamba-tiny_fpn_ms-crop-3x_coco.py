_base_ = "../_base_/detection/mask-rcnn_ms-crop-3x_coco.py"

model = dict(backbone=dict(model_name="vanilla_vmamba_tiny", drop_path_rate=0.2))
