_base_ = [
    './_base_/imagenet.py',
    './_base_/adamw_310e.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='LSKAVAN', arch='tiny', kernel_size=23, drop_path_rate=0.1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=256,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    ),
)
# The base's, without the scope that MMEngine adds to what comes from another package: mmpretrain's
# browse_dataset.py does not take it.
visualizer = dict(
    _delete_=True, type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)
