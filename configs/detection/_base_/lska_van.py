# What every detector here has in common; the backbone and, where the schedule is not
# adamw_1x.py, the optimizer for its leaf to take:
#     model = dict(backbone=_base_.lska_van_tiny)
#     optim_wrapper = dict(optimizer=_base_.adamw)
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)

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
adamw = dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
