_base_ = [
    './_base_/fpn.py',
    './_base_/ade20k.py',
    './_base_/adamw_80k.py',
    './_base_/default_runtime.py',
]
