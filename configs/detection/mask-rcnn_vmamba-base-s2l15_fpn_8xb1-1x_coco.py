# A second result was published for 8 images per update, with the same learning rate
_base_ = "mask-rcnn_vmamba-base-s2l15_fpn_1x_coco.py"

train_dataloader = dict(batch_size=1)
