_base_ = '../configs/detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py'

# Data: one fluorescence image of nuclei, cut into a training and a validation part.
data_root = 'data/nuclei/coco/'
metainfo = dict(classes=('nucleus',), palette=[(255, 170, 0)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(528, 768), ratio_range=(0.75, 1.33), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(192, 192), recompute_bbox=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2)),  # slivers at the crop's edge
    dict(type='RandomFlip', prob=[0.25] * 3, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.5),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=112,  # crops of the one image: 28 iterations an epoch
        dataset=dict(
            type='CocoDataset',
            data_root=data_root,
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            metainfo=metainfo,
            pipeline=train_pipeline,
        ),
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

# Sizes: one class, from random weights, slim enough for two CPU cores.
model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(out_channels=96),
    rpn_head=dict(in_channels=96, feat_channels=96),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96),
        bbox_head=dict(in_channels=96, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(out_channels=96),
        mask_head=dict(in_channels=96, conv_out_channels=96, num_classes=1),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))
    ),
    # The boxes of two nuclei overlap by IoU 0.3 at most (in train.json): what overlaps more
    # is one nucleus found twice, or two as one.
    test_cfg=dict(rcnn=dict(nms=dict(iou_threshold=0.3))),
)

# Schedule: 10 epochs of 28 iterations.
train_cfg = dict(max_epochs=10, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=28),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=1,
        end=10,
        eta_min=5e-6,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=7), checkpoint=dict(interval=2, max_keep_ckpts=2))
randomness = dict(seed=0)
