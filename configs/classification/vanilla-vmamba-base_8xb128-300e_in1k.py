# Vanilla-VMamba-B, published: 83.7 % top-1. Its file's name says drop path 0.6, the config 0.5: chosen, 0.6.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vanilla_vmamba_base", drop_path_rate=0.6))
