# A tracker, whose dataloader draws clips and frames of them.
_base_ = ['mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py']
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
arch = dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4)
model = dict(
    detector=dict(
        init_cfg=None,
        backbone=dict(
            _delete_=True, type='LSKAVAN', kernel_size=7, out_indices=(0, 1, 2, 3), arch=arch
        ),
        neck=dict(in_channels=arch['embed_dims']),
        roi_head=dict(bbox_head=dict(num_classes=2)),
    )
)
shared = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadTrackAnnotations'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='TrackImgSampler'),
    dataset=dict(
        type='Clips',
        data_root='.',
        ann_file='clips.json',
        data_prefix=dict(img_path='img'),
        pipeline=[
            dict(type='UniformRefFrameSample', num_ref_imgs=1, frame_range=2),
            dict(type='TransformBroadcaster', share_random_params=True, transforms=shared),
            dict(type='PackTrackInputs'),
        ],
    ),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4))
train_cfg = dict(max_epochs=1)
val_cfg = test_cfg = None
