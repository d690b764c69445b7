# ImageNet-1k as WebDataset shards: <data_root>/_info.json and the .tar files that it lists, e.g. timm/imagenet-1k-wds of the
# Hugging Face hub. Put this file in the place of imagenet.py in a recipe's _base_.
_base_ = "imagenet.py"

data_root = "data/imagenet-1k-wds"
train_dataloader = dict(
    num_workers=8,  # times processes: should divide the number of shards, 1024 there
    sampler=None,
    dataset=dict(type="visionssm.ImageStream", name="wds/", split="train", num_classes=1000),
)
val_dataloader = dict(
    num_workers=4, sampler=None, dataset=dict(type="visionssm.ImageStream", name="wds/", split="validation", num_classes=1000)
)
test_dataloader = val_dataloader
