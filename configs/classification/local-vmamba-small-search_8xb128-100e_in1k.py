# The search for LocalVMamba-S's scan directions: as LocalVMamba-T's, deeper. Then
# tools/decode_directions.py CHECKPOINT local-vmamba-small_8xb128-300e_in1k -o FOUND.py, and tools/train.py FOUND.py.
_base_ = "local-vmamba-tiny-search_8xb128-100e_in1k.py"

model = dict(backbone=dict(model_name="local_vmamba_small"))
custom_hooks = [
    dict(type="visionssm.DataCheckHook"),
    dict(type="visionssm.EMAHook", decay=0.9999),
    dict(type="visionssm.DirectionsHook", interval=200),
    dict(type="visionssm.ExportHook"),
    dict(type="visionssm.LearningCurveHook"),
]
