# Four bands in .npy files, by a transform of the user.
_base_ = './base.py'
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
load = dict(type='LoadBands')
train_dataloader = dict(dataset=dict(ann_file='npy.json', pipeline=[load, *_base_.pipeline[1:]]))
model = dict(
    data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False), backbone=dict(in_channels=4)
)
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None
