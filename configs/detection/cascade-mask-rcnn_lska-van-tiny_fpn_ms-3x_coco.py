_base_ = ['mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py', './_base_/lska_van.py']

model = dict(
    backbone=_base_.lska_van_tiny,
    neck=dict(in_channels=[32, 64, 160, 256]),
)
optim_wrapper = dict(optimizer=_base_.adamw)
custom_hooks = [dict(type='NumClassCheckHook')]
