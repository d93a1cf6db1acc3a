_base_ = [
    './_base_/fpn.py',
    './_base_/ade20k.py',
    './_base_/adamw_80k.py',
    './_base_/default_runtime.py',
]
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='CheckLabelsHook')]

model = dict(
    backbone=dict(
        type='LSKAVAN',
        arch='tiny',
        kernel_size=23,
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$LSKA_PRETRAINED:pretrained}}/lska-van-tiny_k23_in1k.pth',
        ),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
