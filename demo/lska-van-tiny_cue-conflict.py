_base_ = '../configs/classification/lska-van-tiny_4xb128_in1k.py'

# Data: digits filled with stripes, under labels of ImageNet (tools/dataset_converters).
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root='data/cue-conflict-digits', pipeline=pipeline)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(_delete_=True, ann_file='train.txt', **dataset),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(_delete_=True, ann_file='val.txt', **dataset),
)
# Test: each digit has the stripes of another class.
test_dataloader = dict(
    _delete_=True,
    batch_size=32,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix='conflict', **dataset),
)
test_evaluator = dict(
    _delete_=True,
    type='ShapeBiasMetric',
    csv_dir='work_dirs/shape_bias',
    dataset_name='cue-conflict',
    model_name='lska-van-tiny',
)

model = dict(train_cfg=dict(augments=None))

# Schedule: 8 epochs of 46 iterations.
train_cfg = dict(max_epochs=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=1, end=8, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=15), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
