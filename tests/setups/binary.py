# A segmentor of two classes with one output channel, on iterations.
default_scope = 'mmseg'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='CheckLabelsHook')]
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
data = dict(
    type='BaseSegDataset',
    data_root='.',
    img_suffix='.png',
    seg_map_suffix='.png',
    data_prefix=dict(img_path='img', seg_map_path='binary'),
    pipeline=pipeline,
    metainfo=dict(classes=('no', 'yes'), palette=[[0, 0, 0], [9, 9, 9]]),
)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler'), dataset=data
)
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
test_cfg = dict(type='TestLoop')
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=4, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4),
)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96), seg_pad_val=255),
    backbone=dict(
        type='LSKAVAN',
        kernel_size=7,
        arch=dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=32,
        channels=8,
        num_convs=1,
        concat_input=False,
        num_classes=2,
        out_channels=1,
        threshold=0.3,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
