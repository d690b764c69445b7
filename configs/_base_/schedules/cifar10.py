# The same for every small model: AdamW in bfloat16, a linear warm-up, one cosine to zero over whatever
# --cfg-options train_cfg.max_epochs=N says.
train_cfg = dict(by_epoch=True, max_epochs=80, val_interval=50)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(enable=True, base_batch_size=512)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=5, convert_to_iter_based=True),
]
