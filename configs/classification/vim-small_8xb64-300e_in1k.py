# Vim-S, published: 80.5 % top-1. lr 1e-3 is at 512 images per update.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vim.py",
    "../_base_/runtimes/vim.py",
]

model = dict(backbone=dict(model_name="vim_small_patch16_224", drop_path_rate=0.05))
train_dataloader = dict(batch_size=64, sampler=dict(_delete_=True, type="visionssm.RepeatedAugmentation", num_repeats=3))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
