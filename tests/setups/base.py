# A small RetinaNet of two classes, on eight plain images.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs'),
]
data = dict(
    type='CocoDataset',
    data_root='.',
    ann_file='ann.json',
    data_prefix=dict(img='img'),
    metainfo=dict(classes=('a', 'b')),
    pipeline=pipeline,
)
train_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(_delete_=True, **data)
)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(_delete_=True, test_mode=True, **data)
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file='ann.json')
model = dict(
    backbone=dict(
        _delete_=True,
        type='LSKAVAN',
        kernel_size=7,
        out_indices=(0, 1, 2, 3),
        arch=dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4),
    ),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4))
train_cfg = dict(max_epochs=1)
randomness = dict(seed=0)
