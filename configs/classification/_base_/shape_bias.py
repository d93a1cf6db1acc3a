# An option, to test a classifier of ImageNet's classes on images whose shape and texture are
# of different classes (Geirhos et al., ICLR 2019): add this file to `_base_`, and say
#
#     test_dataloader = dict(_delete_=True, **_base_.cue_conflict_dataloader)
#     test_evaluator = dict(_delete_=True, model_name='NAME', **_base_.shape_bias_evaluator)
#
# .dev_scripts/shape_bias.py reads the CSV file that the test writes.
cue_conflict_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root='data/cue-conflict',  # a folder a shape; SHAPE1-TEXTURE2.png in each
        pipeline=[  # ImageNet's
            dict(type='LoadImageFromFile'),
            dict(
                type='ResizeEdge',
                scale=248,
                edge='short',
                backend='pillow',
                interpolation='bicubic',
            ),
            dict(type='CenterCrop', crop_size=224),
            dict(type='PackInputs'),
        ],
    ),
)
shape_bias_evaluator = dict(
    type='ShapeBiasMetric', csv_dir='work_dirs/shape_bias', dataset_name='cue-conflict'
)
