# Classes in the place of names.
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead
from torch.optim import AdamW

from lska_mm import LSKAVAN

model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(num_classes=2),
    backbone=dict(type=LSKAVAN, kernel_size=7),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=2, in_channels=256, topk=(1,)),
)
pipeline = [dict(type=LoadImageFromFile), dict(type=PackInputs)]
data = dict(type=CustomDataset, data_root='classes', pipeline=pipeline)
train_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type=DefaultSampler, shuffle=True), dataset=data
)
test_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type=DefaultSampler, shuffle=False), dataset=data
)
test_evaluator = dict(type=Accuracy, topk=(1,))
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3))
default_scope = None
