# Vim-Ti+, published: 78.3 % top-1. Fine-tunes the 300-epoch Vim-Ti with its patches at stride 8; pos_embed is resized.
# Initial weights: the published ones; of a run of yours: --cfg-options model.initial_weights=work_dirs/.../epoch_300.pth
# Warm-up, lr and the end of the schedule are all 1e-5 in the published run, i.e. lr is constant, whatever the batch.
_base_ = [
    "../_base_/models/imagenet-classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet-vim.py",
    "../_base_/runtimes/vim.py",
]

model = dict(initial_weights="vim_tiny_patch16_224", backbone=dict(model_name="vim_tiny_patch16_stride8_224", drop_path_rate=0.0))
train_dataloader = dict(sampler=dict(_delete_=True, type="visionssm.RepeatedAugmentation", num_repeats=3))
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
auto_scale_lr = dict(enable=False)
param_scheduler = None
