# A peer of the nanos: DeiT of about as many parameters, patches of 4 pixels.
_base_ = "../_base_/cifar10.py"

model = dict(backbone=dict(model_name="deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4))
