# LocalVMamba: as LocalVim, with mixed precision and the clipping that the published instructions suggest beside it.
_base_ = "imagenet-local-mamba.py"

val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
optim_wrapper = dict(
    dtype="float16",
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(decay=("A_logs", "dt_projs_bias")),  # both 2-D in the published code, which decays them
)
