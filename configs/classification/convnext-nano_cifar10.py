# A peer of the nanos: ConvNeXt of about as many parameters, with the stride and the widths of vmamba_nano, and more blocks.
_base_ = "../_base_/cifar10.py"

model = dict(backbone=dict(model_name="convnext_tiny", patch_size=2, depths=(2, 6, 3, 1), dims=(64, 96, 128, 128)))
