_base_ = '../configs/classification/lska-van-tiny_4xb128_in1k.py'

# Data: scikit-learn's handwritten digits, enlarged.
data_preprocessor = dict(num_classes=10)
classes = [str(digit) for digit in range(10)]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64, interpolation='bicubic'),
    dict(type='RandomCrop', crop_size=64, padding=6),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64, interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/digits',
        data_prefix='train',
        classes=classes,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/digits',
        data_prefix='val',
        classes=classes,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

model = dict(head=dict(num_classes=10, topk=(1,)), train_cfg=dict(augments=None))
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

# Schedule: 15 epochs of 45 iterations.
train_cfg = dict(max_epochs=15)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=1, end=15, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=15), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
