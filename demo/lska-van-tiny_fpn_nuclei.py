_base_ = '../configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'

# Data: one fluorescence image of nuclei, as ADE20K stores them.
metainfo = dict(classes=('background', 'nucleus'), palette=[(60, 60, 60), (255, 170, 0)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='RandomFlip', prob=[0.25] * 3, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# `tools/test.py --tta`: flips at the one size of the training.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='RandomFlip', prob=0.0),
                dict(type='RandomFlip', prob=1.0),
                dict(type='RandomFlip', prob=1.0, direction='vertical'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
dataset = dict(
    type='BaseSegDataset',  # ADE20KDataset takes no other classes than its own
    data_root='data/nuclei/ade',
    metainfo=metainfo,
    img_suffix='.png',
    reduce_zero_label=True,
)
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# Sizes: two classes, from random weights.
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(init_cfg=None),
    decode_head=dict(num_classes=2),
)

# Schedule: 200 iterations.
train_cfg = dict(max_iters=200, val_interval=50)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0, begin=0, end=200, by_epoch=False)]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100, max_keep_ckpts=2))
randomness = dict(seed=0)
