# SoftTeacher's way: half of a batch has no annotations at all.
_base_ = './base.py'
branches = ['sup', 'unsup_teacher', 'unsup_student']
view = [
    dict(type='Resize', scale=(96, 64)),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'homography_matrix',
        ),
    ),
]
labelled = {
    **_base_.data,
    'pipeline': [
        *_base_.pipeline[:3],
        dict(type='MultiBranch', branch_field=branches, sup=dict(type='PackDetInputs')),
    ],
}
unlabelled = {
    **_base_.data,
    'ann_file': 'none.json',
    'filter_cfg': dict(filter_empty_gt=False),
    'pipeline': [
        dict(type='LoadImageFromFile'),
        dict(type='LoadEmptyAnnotations'),
        dict(type='MultiBranch', branch_field=branches, unsup_teacher=view, unsup_student=view),
    ],
}
train_dataloader = dict(
    _delete_=True,
    batch_size=4,
    num_workers=0,
    sampler=dict(type='GroupMultiSourceSampler', batch_size=4, source_ratio=[1, 1]),
    dataset=dict(type='ConcatDataset', datasets=[labelled, unlabelled]),
)
model = dict(
    _delete_=True,
    type='SemiBaseDetector',
    detector=_base_.model,
    data_preprocessor=dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=_base_.model.data_preprocessor
    ),
    semi_train_cfg=dict(freeze_teacher=True, cls_pseudo_thr=0.3, min_pseudo_bbox_wh=(1, 1)),
    semi_test_cfg=dict(predict_on='teacher'),
)
custom_hooks = [dict(type='MeanTeacherHook')]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4))
log_processor = dict(by_epoch=False)
