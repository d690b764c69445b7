# Vanilla-VMamba-S, published: 83.5 % top-1.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vanilla_vmamba_small", drop_path_rate=0.3))
