# LocalVim-S, published: 81.1 % top-1. Its drop path is unknown: chosen, 0.1, the default of the published config.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-local-mamba.py",
    "../_base_/runtimes/local-mamba.py",
]

model = dict(backbone=dict(model_name="local_vim_small", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5")))
