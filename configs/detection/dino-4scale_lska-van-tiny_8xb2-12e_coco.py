_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='NumClassCheckHook')]

model = dict(
    backbone=dict(
        _delete_=True,
        type='LSKAVAN',
        arch='tiny',
        kernel_size=23,
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$LSKA_PRETRAINED:pretrained}}/lska-van-tiny_k23_in1k.pth',
        ),
    ),
    neck=dict(in_channels=[64, 160, 256]),
)
