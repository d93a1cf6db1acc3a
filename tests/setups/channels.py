# A file for each channel, so that an image has several paths.
_base_ = './base.py'
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
load = dict(type='LoadMultiChannelImageFromFiles', color_type='grayscale')
data = dict(type='FilesOfChannels', pipeline=[load, *_base_.pipeline[1:]])
train_dataloader = val_dataloader = test_dataloader = dict(dataset=data)
