_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw-cosine.py", "../_base_/default_runtime.py"]

model = dict(type="visionssm.ImageClassifier", backbone=dict(model_name="vmamba_nano", num_classes=10), label_smoothing=0.1)
