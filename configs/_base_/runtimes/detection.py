# mmdet's runtime, with losses that are read when the logger writes, randomness by (seed, rank, epoch), and progress on the terminal
_base_ = "mmdet::_base_/default_runtime.py"

default_hooks = dict(
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    randomness=dict(type="visionssm.RandomnessHook"),
    progress=dict(type="visionssm.ProgressHook"),
    classes=dict(type="visionssm.ClassCheckHook"),
)
randomness = dict(seed=0)
