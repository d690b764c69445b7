# The search for LocalVMamba-T's scan directions: a narrow super-net with all eight in every layer. Then
# tools/decode_directions.py CHECKPOINT local-vmamba-tiny_8xb128-300e_in1k -o FOUND.py, and tools/train.py FOUND.py.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-local-vmamba.py",
    "../_base_/runtimes/local-mamba.py",
]

model = dict(
    type="visionssm.DirectionSearch",
    backbone=dict(model_name="local_vmamba_tiny", embed_dim=(32, 64, 128, 256), drop_path_rate=0.1),
    mixup=dict(mixup_alpha=0.2),
)
train_cfg = dict(max_epochs=100)
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5")))
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.9999),
    dict(type="visionssm.DirectionsHook", interval=200),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
