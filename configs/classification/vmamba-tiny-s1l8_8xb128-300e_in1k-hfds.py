# VMamba-T[s1l8], published: 82.6 % top-1. Data: the Hugging Face hub.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet-hfds.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vmamba_tiny_s1l8", drop_path_rate=0.2))
