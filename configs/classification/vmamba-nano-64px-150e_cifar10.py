# Images enlarged twofold: stage 1 then has a position for every pixel, for the same parameters and four times the work. Milder
# augmentation, more epochs.
_base_ = "vmamba-nano_cifar10.py"

input_size = 64
train_cfg = dict(max_epochs=150)
model = dict(batch_augmentation=dict(shift=8, distort=0.0), mixup=dict(prob=0.3))
