# LocalVim-T with a class token in the middle, published: 77.8 % top-1. Its drop path is unknown: chosen, LocalVim-T's.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-local-mamba.py",
    "../_base_/runtimes/local-mamba.py",
]

model = dict(backbone=dict(model_name="local_vim_tiny_midclstok", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5")))
