# mmseg's runtime and 160,000 iterations, with the same hooks as detection.py
_base_ = ["mmseg::_base_/default_runtime.py", "mmseg::_base_/schedules/schedule_160k.py"]

default_hooks = dict(
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    randomness=dict(type="visionssm.RandomnessHook"),
    progress=dict(type="visionssm.ProgressHook"),
    classes=dict(type="visionssm.ClassCheckHook"),
)
optim_wrapper = dict(
    type="visionssm.OptimWrapper",
    constructor="visionssm.OptimWrapperConstructor",
    optimizer=dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
randomness = dict(seed=0)
