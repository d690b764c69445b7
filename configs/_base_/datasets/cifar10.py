# <data_root>/{train,test}/<class>/<image>, 32 x 32 pixels. Decoded once; the device augments.
data_root = "data/cifar10"  # --cfg-options data_root=FOLDER
input_size = 32
train_dataloader = dict(
    batch_size=512,
    num_workers=0,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="visionssm.whole_batch"),
    dataset=dict(
        type="visionssm.CachedImages",
        workers=2,
        dataset=dict(type="visionssm.ImageFolder", split="train", transform=dict(no_aug=True)),
    ),
)
test_dataloader = dict(
    batch_size=1000,
    num_workers=0,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="visionssm.whole_batch"),
    dataset=dict(
        type="visionssm.CachedImages",
        workers=2,
        dataset=dict(type="visionssm.ImageFolder", split="test", transform=dict(crop_pct=1.0)),
    ),
)
# nothing is chosen by the test images: the last epoch counts, and the values in between only show how training goes
val_dataloader = test_dataloader
val_evaluator = dict(type="visionssm.TopK", topk=(1,))
test_evaluator = val_evaluator
