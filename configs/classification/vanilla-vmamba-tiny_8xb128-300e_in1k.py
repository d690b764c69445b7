# Vanilla-VMamba-T, published: 82.2 % top-1. Its file's name says drop path 0.1, the config 0.2: chosen, 0.2.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vmamba.py",
    "../_base_/runtimes/vmamba.py",
]

model = dict(backbone=dict(model_name="vanilla_vmamba_tiny", drop_path_rate=0.2))
# published without EMA: the hooks without the average
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
