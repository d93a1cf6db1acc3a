"""Heads of mmdet and mmseg that take the backbone by a config of a few lines.

Each config is written to a file, built, trained one step and asked for a
prediction, as in docs/new_heads.md.
"""

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT
from trainings import detection_data, segmentation_data, train_one_step

DETECTOR = """\
_base_ = 'mmdet::{base}.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True, type='LSKAVAN', arch='tiny', out_indices={out_indices}),
    neck=dict(in_channels={in_channels}),
)
"""
# Detector of mmdet, by its config: stages that its neck takes, 0 to 3.
ALL, LAST_3, LAST = (0, 1, 2, 3), (1, 2, 3), (3,)
DETECTORS = {
    # two stages
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco': ALL,
    'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco': ALL,
    # one stage, anchors
    'retinanet/retinanet_r50_fpn_1x_coco': ALL,
    'atss/atss_r50_fpn_1x_coco': ALL,
    'gfl/gfl_r50_fpn_1x_coco': ALL,
    'paa/paa_r50_fpn_1x_coco': ALL,
    # one stage, no anchors
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco': ALL,
    'vfnet/vfnet_r50_fpn_1x_coco': ALL,
    'tood/tood_r50_fpn_1x_coco': ALL,
    'foveabox/fovea_r50_fpn_4xb4-1x_coco': ALL,
    'rtmdet/rtmdet_tiny_8xb32-300e_coco': LAST_3,
    # DETR and its kin
    'detr/detr_r50_8xb2-150e_coco': LAST,
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco': LAST_3,
    'dab_detr/dab-detr_r50_8xb2-50e_coco': LAST,
    'dino/dino-4scale_r50_8xb2-12e_coco': LAST_3,
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco': ALL,
    # masks
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco': ALL,
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco': ALL,
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': ALL,
    'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco': ALL,
    'solov2/solov2_r50_fpn_1x_coco': ALL,
    'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance': ALL,
}
KINDS = ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco',
         'rtmdet/rtmdet_tiny_8xb32-300e_coco', 'detr/detr_r50_8xb2-150e_coco',
         'solov2/solov2_r50_fpn_1x_coco')  # fmt: skip

SEGMENTOR = """\
_base_ = '{root}/configs/segmentation/lska-van-tiny_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    decode_head=dict(
        _delete_=True, {head},
        channels=64, num_classes=150, norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
)
"""
DEEPEST = 'in_channels=256, in_index=3'
EVERY = 'in_channels=[32, 64, 160, 256], in_index=[0, 1, 2, 3]'
SEGMENTORS = {
    'FCNHead': DEEPEST,
    'PSPHead': DEEPEST,
    'ASPPHead': f'{DEEPEST}, dilations=(1, 2, 3, 4)',
    'DepthwiseSeparableASPPHead': f'{DEEPEST}, dilations=(1, 2, 3), '
    'c1_in_channels=32, c1_channels=48',
    'DMHead': DEEPEST,
    'DAHead': f'{DEEPEST}, pam_channels=32',
    'GCHead': DEEPEST,
    'NLHead': DEEPEST,
    'UPerHead': EVERY,
    'SegformerHead': EVERY,
    'LightHamHead': 'in_channels=[64, 160, 256], in_index=[1, 2, 3], ham_channels=64',
}


def train_and_predict(config, text, data):
    """Write a config, build it, train one step; returns what it then predicts."""
    assert len(text.splitlines()) <= 15
    config.write_text(text)
    cfg = Config.fromfile(config)
    model = train_one_step(cfg, data)
    model.eval()
    with torch.no_grad():
        return model.test_step(data(cfg))


def one_of_each_kind(names, kinds):
    """The others run by make soak."""
    return [name if name in kinds else pytest.param(name, marks=pytest.mark.soak)
            for name in names]  # fmt: skip


@pytest.mark.parametrize(
    'base', one_of_each_kind(DETECTORS, KINDS), ids=lambda base: base.split('/')[1]
)
def test_detector(base, tmp_path):
    widths = [[32, 64, 160, 256][i] for i in DETECTORS[base]]
    text = DETECTOR.format(base=base, out_indices=DETECTORS[base], in_channels=widths)
    results = train_and_predict(tmp_path / 'config.py', text, detection_data)
    for result in results:
        found = result.pred_instances
        assert found.bboxes.shape == (len(found), 4)
        assert found.scores.isfinite().all()


@pytest.mark.parametrize(
    'head', one_of_each_kind(SEGMENTORS, ('DepthwiseSeparableASPPHead', 'UPerHead'))
)
def test_segmentor(head, tmp_path):
    text = SEGMENTOR.format(root=ROOT, head=f"type='{head}', {SEGMENTORS[head]}")
    for result in train_and_predict(tmp_path / 'config.py', text, segmentation_data):
        assert result.pred_sem_seg.data.shape == (1, 64, 96)
        assert result.seg_logits.data.isfinite().all()
