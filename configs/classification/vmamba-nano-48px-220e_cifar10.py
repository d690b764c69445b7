# Images enlarged to 48 x 48: stage 1 then has a position for about every other pixel, for the same parameters and twice the work.
_base_ = "vmamba-nano_cifar10.py"

input_size = 48
train_cfg = dict(max_epochs=220)
model = dict(batch_augmentation=dict(shift=6))
