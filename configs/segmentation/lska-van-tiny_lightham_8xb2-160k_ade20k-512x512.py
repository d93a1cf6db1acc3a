_base_ = [
    './_base_/lightham.py',
    './_base_/ade20k.py',
    './_base_/adamw_160k.py',
    './_base_/default_runtime.py',
]

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10))))
train_dataloader = dict(batch_size=2)
