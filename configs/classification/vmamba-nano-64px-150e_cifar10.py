# Images enlarged twofold: stage 1 then has a position for each of the 32 x 32 pixels, for the same parameters and four times the work.
# After 80 epochs of the common recipe the nano fits its own augmented images no better than those of the test, so it also gets more
# epochs and milder augmentation.
_base_ = "vmamba-nano_cifar10.py"

input_size = 64
train_cfg = dict(max_epochs=150)
model = dict(batch_augmentation=dict(shift=8, distort=0.0), mixup=dict(prob=0.3))
