_base_ = "../_base_/detection/mask-rcnn_1x_coco.py"

model = dict(backbone=dict(model_name="local_vmamba_small", drop_path_rate=0.2))

optim_wrapper = dict(dtype="float16")
