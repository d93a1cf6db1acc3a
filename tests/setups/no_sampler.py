# Samplers that are None, for defaults.
_base_ = './base.py'
train_dataloader = dict(sampler=None, batch_sampler=None)
