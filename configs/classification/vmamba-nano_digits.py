# Real handwritten digits, nothing to download: two to three minutes on a CPU with two cores. Any other nano:
# --cfg-options model.backbone.model_name=vim_nano
_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw-cosine.py", "../_base_/default_runtime.py"]

model = dict(type="visionssm.ImageClassifier", backbone=dict(model_name="vmamba_nano", num_classes=10), label_smoothing=0.1)
train_cfg = dict(max_epochs=4, val_interval=1)
