_base_ = "../default_runtime.py"

custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.9999, validate_both=True),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
randomness = dict(seed=0)
