default_hooks = dict(
    runtime_info=dict(type="visionssm.RuntimeInfoHook"),
    logger=dict(type="LoggerHook", interval=50),
    # two, since mmengine removes the older one before it writes the newer one
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    randomness=dict(type="visionssm.RandomnessHook"),
    unreadable_images=dict(type="visionssm.UnreadableImagesHook"),
    progress=dict(type="visionssm.ProgressHook"),
)
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.ContactSheetHook"),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
randomness = dict(seed=0)
