# <data_root>/{train,val,test}/<class>/<image>
data_root = None  # --cfg-options data_root=FOLDER
input_size = 64
collate_fn = dict(type="visionssm.collate")
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=collate_fn,
    worker_init_fn=dict(type="visionssm.init_worker"),
    dataset=dict(type="visionssm.ImageFolder", split="train", transform=dict(scale=(0.3, 1.0), color_jitter=0.2)),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate_fn,
    worker_init_fn=dict(type="visionssm.init_worker"),
    dataset=dict(type="visionssm.ImageFolder", split="val", transform=dict(crop_pct=1.0, interpolation="bicubic")),
)
test_dataloader = dict(
    batch_size=128,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate_fn,
    worker_init_fn=dict(type="visionssm.init_worker"),
    dataset=dict(type="visionssm.ImageFolder", split="test", transform=dict(crop_pct=1.0, interpolation="bicubic")),
)
val_evaluator = dict(type="visionssm.TopK", topk=(1, 5))
test_evaluator = val_evaluator
