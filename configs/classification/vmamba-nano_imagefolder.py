# Photographs of your own: --cfg-options data_root=FOLDER, with FOLDER/{train,val,test}/<class>/<image>.
# The number of classes is that of FOLDER/train; without a val or test folder name another split, e.g.
# val_dataloader.dataset.split=test
_base_ = ["../_base_/datasets/imagefolder.py", "../_base_/schedules/adamw-cosine.py", "../_base_/default_runtime.py"]

model = dict(type="visionssm.ImageClassifier", backbone=dict(model_name="vmamba_nano"), label_smoothing=0.1)
