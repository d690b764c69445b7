_base_ = "../_base_/cifar10.py"

model = dict(backbone=dict(model_name="vmamba_nano"))
