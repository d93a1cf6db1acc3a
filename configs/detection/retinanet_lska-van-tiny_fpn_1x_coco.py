_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    './_base_/lska_van.py',
    './_base_/adamw_1x.py',
    './_base_/tta.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=_base_.lska_van_tiny,
    neck=dict(in_channels=[32, 64, 160, 256]),
)
custom_hooks = [dict(type='NumClassCheckHook')]
