# Two data sets of different pipelines in one, one of them repeated.
_base_ = './base.py'
crop = dict(type='RandomCrop', crop_size=(48, 48))
other = {**_base_.data, 'pipeline': [*_base_.pipeline[:3], crop, _base_.pipeline[3]]}
repeated = dict(type='RepeatDataset', times=2, dataset=other)
train_dataloader = dict(
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[_base_.data, repeated])
)
