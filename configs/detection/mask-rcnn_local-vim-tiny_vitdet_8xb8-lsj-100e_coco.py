# The published config, called Cascade there, builds a Mask R-CNN, and its 31 million parameters are a Mask R-CNN's.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/detection/vitdet_lsj-100e_coco.py"]

norm_cfg = dict(type="visionssm.LayerNorm2d")
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
    backbone=dict(
        _delete_=True,
        type="visionssm.Backbone",
        model_name="local_vim_tiny",
        out_indices=(19,),
        tap="mixer",
        out_norm=True,
        img_size=1024,
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="visionssm.SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.7), clip_grad=dict(max_norm=35))
