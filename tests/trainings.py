"""Small trainings of the three tasks, as configs: 8 channels, few images, a second or two."""

import cv2
from mmengine.config import Config
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
        batch_size=2,
        dataset=dict(type='RepeatDataset', times=4, dataset=data),
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
