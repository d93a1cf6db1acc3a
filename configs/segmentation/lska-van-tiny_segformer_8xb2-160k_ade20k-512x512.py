_base_ = [
    './_base_/segformer.py',
    './_base_/ade20k.py',
    './_base_/adamw_160k.py',
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
    decode_head=dict(in_channels=[32, 64, 160, 256]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10))))
train_dataloader = dict(batch_size=2)
