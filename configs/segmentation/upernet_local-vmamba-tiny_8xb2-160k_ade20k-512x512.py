# Its ImageNet weights were never released: --cfg-options model.backbone.pretrained=FILE, of a training of your own
_base_ = "../_base_/segmentation/upernet_160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="local_vmamba_tiny", drop_path_rate=0.1))
