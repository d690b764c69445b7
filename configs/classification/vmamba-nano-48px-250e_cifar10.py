# Images enlarged to 48 x 48, twice the work for the same parameters, and the common recipe's augmentation, for longer.
_base_ = "vmamba-nano_cifar10.py"

input_size = 48
train_cfg = dict(max_epochs=250)
model = dict(batch_augmentation=dict(shift=6))
