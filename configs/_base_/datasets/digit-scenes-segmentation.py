# Scenes of scikit-learn's digits, which tools/draw_digit_scenes.py draws into `data_root`
data_root = "work_dirs/digit-scenes"
metainfo = dict(classes=("background", "digit"), palette=[[0, 0, 0], [230, 25, 75]])

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        img_suffix=".png",
        data_root=data_root,
        data_prefix=dict(img_path="train", seg_map_path="semantic/train"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        img_suffix=".png",
        data_root=data_root,
        data_prefix=dict(img_path="val", seg_map_path="semantic/val"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    ),
)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
