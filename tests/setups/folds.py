# One of two folds of a data set.
_base_ = './classifier.py'
train_dataloader = dict(
    dataset=dict(_delete_=True, type='KFoldDataset', dataset=_base_.data, num_splits=2, fold=0)
)
