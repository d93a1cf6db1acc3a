_base_ = [
    './_base_/upernet.py',
    './_base_/ade20k.py',
    './_base_/adamw_160k.py',
    './_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=2)
