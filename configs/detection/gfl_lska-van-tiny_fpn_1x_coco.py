_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py', './_base_/lska_van.py']

model = dict(
    backbone=_base_.lska_van_tiny,
    neck=dict(in_channels=[32, 64, 160, 256]),
)
optim_wrapper = dict(optimizer=_base_.adamw)
custom_hooks = [dict(type='NumClassCheckHook')]
