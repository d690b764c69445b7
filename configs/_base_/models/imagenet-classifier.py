# Soft targets from mixup or cutmix, one of them for every batch; random erasing after normalisation.
model = dict(
    type="visionssm.ImageClassifier",
    backbone=dict(model_name="", num_classes=1000),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch"),
    random_erasing=dict(probability=0.25, mode="pixel", max_count=1),
)
