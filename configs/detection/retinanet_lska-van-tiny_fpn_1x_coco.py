_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    './_base_/adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
    'mmdet::retinanet/retinanet_tta.py',
]
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='NumClassCheckHook')]

model = dict(
    backbone=dict(
        _delete_=True,
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
