# VMamba's training: AdamW, 300 epochs, float16 with a scaled loss, the same for all sizes. lr = 5e-4 x images per update / 512.
# The published code keeps the epoch that is best on the validation set, which is also the set that it reports; here the last
# epoch counts.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    dtype="float16",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(decay=("A_logs", "dt_projs_bias")),  # both 2-D in the published code, which decays them
)
auto_scale_lr = dict(enable=True, base_batch_size=1024)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, convert_to_iter_based=True),
]
