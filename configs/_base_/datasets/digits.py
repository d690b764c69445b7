input_size = 32
collate_fn = dict(type="visionssm.collate")
# no flips: a mirrored digit is another one, or none
augmentation = dict(scale=(0.85, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None, interpolation="bicubic")
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=collate_fn,
    dataset=dict(type="visionssm.Digits", split="train", transform=augmentation),
)
val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate_fn,
    dataset=dict(type="visionssm.Digits", split="test", transform=dict(crop_pct=1.0, interpolation="bicubic")),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="visionssm.TopK", topk=(1,))
test_evaluator = val_evaluator
