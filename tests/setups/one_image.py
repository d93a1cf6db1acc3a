# One image a step.
_base_ = './base.py'
train_dataloader = dict(batch_size=1)
model = dict(backbone=dict(norm_eval=True, frozen_stages=1))
