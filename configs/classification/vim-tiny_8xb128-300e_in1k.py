# Vim-Ti, published: 76.1 % top-1.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vim.py",
    "../_base_/runtimes/vim.py",
]

model = dict(backbone=dict(model_name="vim_tiny_patch16_224", drop_path_rate=0.0))
train_dataloader = dict(sampler=dict(_delete_=True, type="visionssm.RepeatedAugmentation", num_repeats=3))
