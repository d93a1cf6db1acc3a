# An image beyond the limit of Pillow.
_base_ = './base.py'
data = dict(ann_file='large.json', data_prefix=dict(img='large'))
train_dataloader = dict(batch_size=1, dataset=data)
