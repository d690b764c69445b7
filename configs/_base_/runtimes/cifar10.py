_base_ = "../default_runtime.py"

# an epoch takes a second or two: to write a checkpoint after each would cost more than it could save
default_hooks = dict(checkpoint=dict(interval=20))
log_processor = dict(window_size=50)  # the logger's interval: times are means over all iterations
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.999),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
randomness = dict(seed=0)
