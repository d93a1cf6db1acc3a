_base_ = [
    'mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py',
    './_base_/lska_van.py',
]

model = dict(
    backbone=_base_.lska_van_tiny,
    neck=dict(in_channels=[32, 64, 160, 256]),
)

# Optimizer: as on COCO; the schedule and clipping are mmrotate's.
optim_wrapper = dict(optimizer=_base_.adamw)
custom_hooks = [dict(type='mmdet.NumClassCheckHook')]
