_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
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
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
)
