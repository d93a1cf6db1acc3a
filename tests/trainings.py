"""Small trainings of the three tasks.

As configs for the Runner, with 8 channels, few images, of a second or two; and one step of a
config's own model.
"""

import cv2
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from sklearn.datasets import load_digits

from conftest import ROOT

ARCH = dict(embed_dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], ffn_ratios=[2, 2, 2, 2])
STEPS = 8


def segmentor(nuclei, work_dir):
    """Iterations over an endless stream of samples: crops, flips, dropped paths."""
    cfg = Config.fromfile(ROOT / 'demo/lska-van-tiny_fpn_nuclei.py')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = f'{nuclei}/ade'
    cfg.train_pipeline[2].crop_size = cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    cfg.model.neck.update(in_channels=ARCH['embed_dims'], out_channels=16)
    cfg.model.decode_head.update(in_channels=[16] * 4, channels=16)
    cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS)
    return shrink(cfg, work_dir)


def classifier(folder, work_dir):
    """Two epochs of 4 steps, with images mixed in the process and labels smoothed."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:30], digits.target)):
        path = folder / f'train/{label}/{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image * 16)
    cfg = Config.fromfile(ROOT / 'demo/lska-van-tiny_digits.py')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.update(data_root=str(folder), data_prefix='train')
    cfg.train_dataloader.batch_size = 8
    cfg.model.head.in_channels = ARCH['embed_dims'][-1]
    cfg.model.train_cfg = dict(augments=dict(type='Mixup', alpha=0.8))
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    return shrink(cfg, work_dir)


def detector(nuclei, work_dir):
    """Two images a step, with boxes and masks, cut and painted at random, four mixed into one."""
    cfg = Config.fromfile(ROOT / 'demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py')
    data = cfg.train_dataloader.dataset.dataset
    data.data_root = f'{nuclei}/coco/'
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = f'{nuclei}/coco/'
        cfg[f'{split}_evaluator'].ann_file = f'{nuclei}/coco/annotations/val.json'
    data.pipeline[2].scale = (96, 96)
    data.pipeline[3].crop_size = (64, 64)
    cfg.train_dataloader.update(
        batch_size=2, dataset=dict(type='RepeatDataset', times=4, dataset=data)
    )
    cfg.model.neck.in_channels = ARCH['embed_dims']
    cfg.train_cfg.update(max_epochs=STEPS // 2, val_interval=STEPS // 2)
    return shrink(cfg, work_dir)


def shrink(cfg, work_dir):
    cfg.model.backbone.update(arch=ARCH, kernel_size=7, drop_path_rate=0.5)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=2, max_keep_ckpts=2)
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(work_dir)
    return cfg


# --- One step ---------------------------------------------------------------------------


def detection_data(cfg):
    """Two images with random boxes, and masks where the config loads them."""
    from mmdet.testing import demo_mm_inputs

    masks = any(transform.get('with_mask') for transform in cfg.train_pipeline)
    return demo_mm_inputs(2, image_shapes=[(3, 96, 128), (3, 64, 96)], with_mask=masks)


def segmentation_data(cfg):
    """Two images with random labels of ADE20K's classes."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(150, (1, 64, 96))),
            metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)),
        )
        for _ in range(2)
    ]
    inputs = [torch.randint(256, (3, 64, 96), dtype=torch.uint8) for _ in samples]
    return dict(inputs=inputs, data_samples=samples)


def classification_data(cfg):
    """Two images with labels."""
    from mmpretrain.structures import DataSample

    inputs = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    return dict(inputs=inputs, data_samples=[DataSample().set_gt_label(i) for i in (3, 7)])


DATA = dict(mmdet=detection_data, mmseg=segmentation_data, mmpretrain=classification_data)


def build_model(cfg):
    """A config's model with random weights, the same ones each time."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    if 'num_queries' in cfg.model:  # no more than the small images have pixels
        cfg.model.num_queries = 100
    rcnn = (cfg.model.get('train_cfg') or {}).get('rcnn') or []
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:  # regions that a head trains on
        if 'num' in stage.get('sampler', {}):
            stage.sampler.num = 16
    if cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 96)
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    return model


def train_one_step(cfg, data):
    """Build a config's model, check a step of it; the model."""
    model = build_model(cfg)
    MessageHub.get_current_instance().update_info('epoch', 0)  # as the Runner does
    weight = next(p for p in model.backbone.parameters() if p.requires_grad)
    before = weight.clone()
    losses = model.train_step(data(cfg), build_optim_wrapper(model, cfg.optim_wrapper))
    assert losses['loss'].isfinite()
    assert not torch.equal(weight, before)
    return model
