# Half of the batches are mixed by cutmix; half of the images are turned, zoomed and recoloured a little.
model = dict(
    type="visionssm.ImageClassifier",
    backbone=dict(model_name="", num_classes=10, drop_path_rate=0.05),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.0, cutmix_alpha=1.0, prob=0.5),
    batch_augmentation=dict(shift=4, hflip=0.5, distort=0.5, rotation=15, zoom=0.15, colour=0.4),
)
