# LocalMamba's training: AdamW, 300 epochs, warm-up in steps of an epoch, cosine per iteration.
# Precision and clipping of each published model are unknown: chosen, full precision and no clipping, but for LocalVMamba.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.04),
    paramwise_cfg=dict(decay=("A_logs",)),  # 2-D per direction in the published code, which decays it
)
auto_scale_lr = dict(enable=True, base_batch_size=1024)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, end=21),  # 1e-3 from epoch 20 on
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=20, convert_to_iter_based=True),
]
