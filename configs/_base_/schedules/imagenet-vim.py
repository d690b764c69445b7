# Vim's training, which is DeiT's: AdamW, 300 epochs, full precision, no clipping, every image three times per epoch.
# The published code scales lr by images per update / 512; lr here is at base_batch_size.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    paramwise_cfg=dict(decay=("A_logs",)),  # 2-D per direction in the published code, which decays it
)
auto_scale_lr = dict(enable=True, base_batch_size=1024)
# The published loop steps once per epoch, and whether its cosine counts the warm-up epochs is unknown: chosen, a step per
# iteration, and a cosine over the epochs after the warm-up.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5, convert_to_iter_based=True),
]
