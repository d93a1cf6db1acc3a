_base_ = './lska-van-tiny_fpn_nuclei.py'

# Data: four bands of 8 bit, in PNG files (tools/dataset_converters/nuclei.py --formats bands).
load = dict(type='LoadImageFromFile', color_type='unchanged')
# Here, as the preprocessor of the default stack's mmseg takes means of 1 or 3 values only.
normalize = dict(type='Normalize', mean=[116.0] * 4, std=[57.0] * 4, to_rgb=False)
train_pipeline = [
    load,
    *_base_.train_pipeline[1:-1],
    normalize,
    _base_.train_pipeline[-1],
]
test_pipeline = [load, *_base_.test_pipeline[1:-1], normalize, _base_.test_pipeline[-1]]
tta_pipeline = [load, normalize, *_base_.tta_pipeline[1:]]
dataset = dict(data_root='data/nuclei/bands')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# The backbone: from weights for three channels.
model = dict(
    data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False),
    backbone=dict(
        in_channels=4,
        init_cfg=dict(
            _delete_=True,
            type='ResizedPretrained',
            checkpoint='work_dirs/demo-segmentation/iter_200.pth',
        ),
    ),
)
