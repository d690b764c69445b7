# ImageNet-1k from the Hugging Face hub, cached in data_root; needs `pip install datasets` and an account that has accepted
# the terms. Put this file in the place of imagenet.py in a recipe's _base_.
_base_ = "imagenet.py"

data_root = None
train_dataloader = dict(dataset=dict(type="visionssm.HubImages", name="ILSVRC/imagenet-1k", split="train"))
val_dataloader = dict(dataset=dict(type="visionssm.HubImages", name="ILSVRC/imagenet-1k", split="validation"))
test_dataloader = val_dataloader
