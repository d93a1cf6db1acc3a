# What every detector here has in common, and the backbone for its leaf to take:
#     model = dict(backbone=_base_.lska_van_tiny)
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='mmdet.NumClassCheckHook')]

lska_van_tiny = dict(
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
)
