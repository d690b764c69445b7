# Images enlarged twofold: stage 1 then has a position for every pixel, for the same parameters and four times the work. Muon
# (timm's; arXiv:2502.16982 for its learning rate) makes the most of an epoch; batches are large enough for the device to be busy
# while the host launches its many small kernels. The average follows twice as fast, for an epoch has half as many updates.
_base_ = "vmamba-nano_cifar10.py"

input_size = 64
train_dataloader = dict(batch_size=1024)
train_cfg = dict(max_epochs=140)
model = dict(batch_augmentation=dict(shift=8))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="timm.optim.Muon", lr=4e-3, weight_decay=0.05, nesterov=True),
    paramwise_cfg=dict(fallback=("*.patch_embed.*", "*.head.*", "*.x_proj_weight", "*.dt_projs_weight")),  # ends, and stacks
)
auto_scale_lr = dict(base_batch_size=1024)
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.998),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
