# ImageNet-1k as folders: <data_root>/{train,val}/<class>/<image>. The published recipes share this much: crops of 224 px,
# bicubic, a flip, RandAugment (which leaves colour jitter unused); test images 256 px on the short side, cropped to 224.
data_root = "data/imagenet"  # --cfg-options data_root=FOLDER
input_size = 224
collate_fn = dict(type="visionssm.collate")
train_dataloader = dict(
    batch_size=128,  # per process
    num_workers=12,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=collate_fn,
    worker_init_fn=dict(type="visionssm.init_worker"),
    dataset=dict(
        type="visionssm.ImageFolder",
        split="train",
        transform=dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, interpolation="bicubic"),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=12,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate_fn,
    worker_init_fn=dict(type="visionssm.init_worker"),
    dataset=dict(type="visionssm.ImageFolder", split="val", transform=dict(crop_pct=0.875, interpolation="bicubic")),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="visionssm.TopK", topk=(1, 5))
test_evaluator = val_evaluator
