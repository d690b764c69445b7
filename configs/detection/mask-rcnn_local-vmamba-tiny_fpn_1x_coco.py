# Its ImageNet weights were never released: --cfg-options model.backbone.pretrained=FILE, of a training of your own
_base_ = "../_base_/detection/mask-rcnn_1x_coco.py"

model = dict(backbone=dict(model_name="local_vmamba_tiny", drop_path_rate=0.2))

optim_wrapper = dict(dtype="float16")
