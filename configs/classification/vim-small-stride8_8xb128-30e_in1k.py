# Vim-S+, published: 81.6 % top-1. Fine-tunes the 300-epoch Vim-S as Vim-Ti+ is.
_base_ = "vim-tiny-stride8_8xb128-30e_in1k.py"

model = dict(initial_weights="vim_small_patch16_224", backbone=dict(model_name="vim_small_patch16_stride8_224"))
