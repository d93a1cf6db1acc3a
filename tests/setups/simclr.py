# Self-supervised, with two views of each image.
_base_ = './classifier.py'
views = dict(type='RandomResizedCrop', scale=48)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='MultiView', num_views=2, transforms=[[views]]),
            dict(type='PackInputs'),
        ]
    )
)
model = dict(
    _delete_=True,
    type='SimCLR',
    data_preprocessor=dict(type='SelfSupDataPreprocessor'),
    backbone=_base_.backbone,
    neck=dict(type='NonLinearNeck', in_channels=32, hid_channels=32, out_channels=8, num_layers=2),
    head=dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss'), temperature=0.1),
)
test_dataloader = test_evaluator = test_cfg = None
