_base_ = "../_base_/segmentation/upernet_160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="local_vmamba_small", drop_path_rate=0.2))

optim_wrapper = dict(dtype="float16")
