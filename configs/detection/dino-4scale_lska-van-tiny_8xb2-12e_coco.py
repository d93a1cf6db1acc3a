_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', './_base_/lska_van.py']

model = dict(
    backbone={**_base_.lska_van_tiny, 'out_indices': (1, 2, 3)},
    neck=dict(in_channels=[64, 160, 256]),
)
custom_hooks = [dict(type='NumClassCheckHook')]
