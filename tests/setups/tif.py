# Four bands of float32 in TIFF files, which Pillow does not open and OpenCV does.
_base_ = './base.py'
load = dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True)
train_dataloader = dict(dataset=dict(ann_file='tif.json', pipeline=[load, *_base_.pipeline[1:]]))
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None
model = dict(
    data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False), backbone=dict(in_channels=4)
)
