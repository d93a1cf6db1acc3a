_base_ = './lska-van-tiny_fpn_nuclei.py'

# Data: four bands of 8 bit, in PNG files (tools/dataset_converters/nuclei.py --formats bands).
load = dict(type='LoadImageFromFile', color_type='unchanged')
train_pipeline = [load, *_base_.train_pipeline[1:]]
test_pipeline = [load, *_base_.test_pipeline[1:]]
dataset = dict(data_root='data/nuclei/bands')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# The backbone: from weights for three channels; a mean and a deviation for each band.
model = dict(
    data_preprocessor=dict(mean=[116.0] * 4, std=[57.0] * 4, bgr_to_rgb=False),
    backbone=dict(
        in_channels=4,
        init_cfg=dict(
            type='ResizedPretrained', checkpoint='work_dirs/demo-segmentation/iter_200.pth'
        ),
    ),
)
