# Published without a result, and without initial weights, as a wrong path in it was ignored
_base_ = "mask-rcnn_local-vim-tiny_vitdet_8xb8-lsj-100e_coco.py"

model = dict(backbone=dict(model_name="local_vim_small", pretrained=False), neck=dict(in_channels=384))
