# VMamba-S[s1l20], published: 83.3 % top-1.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vmamba_small_s1l20", drop_path_rate=0.3))
