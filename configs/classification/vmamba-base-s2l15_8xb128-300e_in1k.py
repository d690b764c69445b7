# VMamba-B[s2l15], published: 83.9 % top-1.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vmamba_base_s2l15", drop_path_rate=0.6))
