# A small classifier of two classes, as mmpretrain has it.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
arch = dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4)
backbone = dict(type='LSKAVAN', kernel_size=7, arch=arch)
data_preprocessor = dict(num_classes=2)
model = dict(
    type='ImageClassifier',
    backbone=backbone,
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32, topk=(1,)),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
data = dict(type='CustomDataset', data_root='classes', pipeline=pipeline)
sampler = dict(type='DefaultSampler', shuffle=True)
train_dataloader = dict(batch_size=4, num_workers=1, sampler=sampler, dataset=data)
test_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data
)
test_evaluator = dict(type='Accuracy', topk=(1,))
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
