# LocalVMamba-T, published: 82.7 % top-1. Its drop path is unknown (the model's default is 0.2, the config's 0.1): chosen, 0.2.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-local-vmamba.py",
    "../_base_/runtimes/local-mamba.py",
]

model = dict(backbone=dict(model_name="local_vmamba_tiny", drop_path_rate=0.2), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5")))
