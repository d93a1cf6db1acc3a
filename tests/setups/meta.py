# A dict within metainfo, which MMEngine stores in the checkpoint: must be tested and resumed.
_base_ = './base.py'
train_dataloader = dict(
    dataset=dict(metainfo=dict(classes=('a', 'b'), groups=dict(animals=['a'])))
)
