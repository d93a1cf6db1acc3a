"""Every config parses, is what its name says, builds and trains one step."""

import importlib
import re
from functools import lru_cache
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from conftest import ROOT, load_tool
from lska_mm.models.archs import ARCHS
from trainings import DATA, classifier, train_one_step

ALL = sorted((ROOT / 'configs').glob('*/*.py'))
CONFIGS = [path for path in ALL if 'dota' not in path.stem]  # of mmrotate: test_rotate.py
PLUGIN = ROOT / 'configs/detection/retinanet_r50-lska_fpn_1x_coco.py'
WITH_VAN = [path for path in CONFIGS if path != PLUGIN]
ADE20K = 'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'
RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
BACKBONE = r'lska-van-(?P<arch>tiny|small|base)(-k(?P<k>\d+))?'
NAMES = dict(
    classification=rf'{BACKBONE}_(?P<gpus>\d)xb(?P<batch>\d+)_in1k',
    detection=rf'(?P<head>[a-z0-9-]+)_{BACKBONE}(_fpn_(ms-3x|1x)|_(?P<gpus>\d)xb(?P<batch>\d)-12e)_coco',
    segmentation=rf'{BACKBONE}_(?P<head>fpn|upernet|segformer|lightham)_(?P<gpus>\d)xb(?P<batch>\d)'
    r'-(?P<k_iters>\d+)k_ade20k-512x512',
)
DETECTORS = {
    'mask-rcnn': 'MaskRCNN',
    'retinanet': 'RetinaNet',
    'cascade-mask-rcnn': 'CascadeRCNN',
    'atss': 'ATSS',
    'gfl': 'GFL',
    'dino-4scale': 'DINO',
}
# The toolbox's own config of each head, and of VAN.
OWN_CONFIGS = {
    'mask-rcnn': 'mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'retinanet': 'mmdet/retinanet/retinanet_r50_fpn_1x_coco',
    'cascade-mask-rcnn': 'mmdet/cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco',
    'atss': 'mmdet/atss/atss_r50_fpn_1x_coco',
    'gfl': 'mmdet/gfl/gfl_r50_fpn_1x_coco',
    'dino-4scale': 'mmdet/dino/dino-4scale_r50_8xb2-12e_coco',
    'fpn': 'mmseg/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512',
    'upernet': 'mmseg/upernet/upernet_r50_4xb4-160k_ade20k-512x512',
    'segformer': 'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512',
    'lightham': 'mmseg/segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512',
    'classification': 'mmpretrain/van/van-tiny_8xb128_in1k',
}
# The keys beside theirs, which docs/ explains.
ADDED = dict(
    classification={'custom_imports'},
    detection={'custom_imports', 'custom_hooks'},
    segmentation={'custom_imports', 'custom_hooks', 'sync_bn', 'auto_scale_lr'},
)
HEADS = dict(upernet='UPerHead', segformer='SegformerHead', lightham='LightHamHead')
COUNTS = dict(classification=15, detection=11, segmentation=8)
SIZES = re.compile(r'-van-(small|base|tiny-k\d+)')
WIDTHS = dict(tiny=[32, 64, 160, 256], small=[64, 128, 320, 512], base=[64, 128, 320, 512])


def configs(task):
    paths = [path for path in WITH_VAN if path.parent.name == task]
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


@pytest.mark.parametrize('task', COUNTS)
def test_there_are_as_many_configs_as_promised(task):
    assert len([path for path in CONFIGS if path.parent.name == task]) == COUNTS[task]


@lru_cache
def own_keys(name):
    package, config = OWN_CONFIGS[name].split('/', 1)
    folder = Path(importlib.import_module(package).__file__).parent / '.mim/configs'
    return Config.fromfile(folder / f'{config}.py').keys()


@pytest.mark.parametrize('path', WITH_VAN, ids=lambda path: path.stem)
def test_backbone_agrees_with_name(path, monkeypatch):
    """And a dumped config has the keys of the toolbox's own, but for those in `ADDED`."""
    monkeypatch.delenv('LSKA_PRETRAINED', raising=False)
    name = re.fullmatch(NAMES[path.parent.name], path.stem)
    assert name, f'{path.stem} does not follow the naming scheme'
    cfg = Config.fromfile(path)
    backbone, arch, k = cfg.model.backbone, name['arch'], int(name['k'] or 23)
    assert cfg.custom_imports == dict(imports=['lska_mm'], allow_failed_imports=False)
    assert (backbone.type, backbone.arch, backbone.kernel_size) == ('LSKAVAN', arch, k)
    assert backbone.drop_path_rate == 0.1
    assert ARCHS[arch]['embed_dims'] == WIDTHS[arch]
    if path.parent.name != 'classification':
        weights = f'pretrained/lska-van-{arch}_k{k}_in1k.pth'
        assert backbone.init_cfg == dict(type='Pretrained', checkpoint=weights)
        stages = (1, 2, 3) if 'dino' in path.stem else (0, 1, 2, 3)
        assert backbone.out_indices == stages
    if name.groupdict().get('gpus'):
        assert cfg.train_dataloader.batch_size == int(name['batch'])
        assert cfg.auto_scale_lr.base_batch_size == int(name['gpus']) * int(name['batch'])
    own = own_keys(name.groupdict().get('head', 'classification'))
    assert cfg.keys() - own == ADDED[path.parent.name]


@configs('detection')
def test_detection_recipe(path):
    cfg = Config.fromfile(path)
    name = re.fullmatch(NAMES['detection'], path.stem)
    assert cfg.model.type == DETECTORS[name['head']]
    hook = 'NumClassCheckHook' if cfg.default_scope == 'mmdet' else 'mmdet.NumClassCheckHook'
    assert cfg.custom_hooks == [dict(type=hook)]
    widths = WIDTHS[name['arch']]
    assert cfg.model.neck.in_channels == [widths[i] for i in cfg.model.backbone.out_indices]
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    optimizer = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    if name['head'] == 'dino-4scale':
        optimizer = dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert cfg.optim_wrapper.optimizer == optimizer
    if 'ms-3x' in path.stem:  # 12 epochs of 3 rounds
        assert cfg.train_dataloader.dataset.times * cfg.train_cfg.max_epochs == 36
    if name['head'] not in ('mask-rcnn', 'retinanet'):
        return  # mmdet's schedules
    # 1x on COCO: 12 epochs, 8 GPUs with 2 images each.
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.type, warm_up.by_epoch, warm_up.end) == ('LinearLR', False, 1000)
    assert (steps.type, steps.milestones) == ('MultiStepLR', [8, 11])
    if name['head'] == 'retinanet':
        assert (cfg.model.neck.start_level, cfg.model.neck.num_outs) == (1, 5)


def test_plugin_is_all_that_differs_from_mmdet_s_config(tmp_path):
    (tmp_path / 'plain.py').write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    cfg = Config.fromfile(PLUGIN).to_dict()
    assert cfg.pop('custom_imports') == dict(imports=['lska_mm'], allow_failed_imports=False)
    assert cfg.pop('custom_hooks') == [dict(type='NumClassCheckHook')]
    (plugin,) = cfg['model']['backbone'].pop('plugins')
    assert (plugin['cfg']['type'], plugin['cfg']['kernel_size']) == ('LSKA', 23)
    frozen = cfg['model']['backbone']['frozen_stages']
    assert plugin['stages'] == tuple(stage >= frozen for stage in range(4))
    assert cfg == Config.fromfile(tmp_path / 'plain.py').to_dict()


@configs('segmentation')
def test_segmentation_recipe(path):
    cfg = Config.fromfile(path)
    name = re.fullmatch(NAMES['segmentation'], path.stem)
    widths, iters = WIDTHS[name['arch']], int(name['k_iters']) * 1000
    assert cfg.sync_bn == 'torch'
    assert cfg.custom_hooks == [dict(type='CheckLabelsHook')]
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iters
    assert cfg.param_scheduler[-1].type == 'PolyLR'
    assert cfg.train_dataloader.dataset.type == 'ADE20KDataset'
    assert cfg.model.decode_head.num_classes == 150
    assert cfg.model.data_preprocessor.size == (512, 512)
    optimizer = cfg.optim_wrapper.optimizer
    rates = (optimizer.lr, optimizer.weight_decay, cfg.param_scheduler[-1].power)
    if name['head'] == 'fpn':
        assert (cfg.model.decode_head.type, cfg.model.neck.in_channels) == ('FPNHead', widths)
        assert rates == (1e-4, 1e-4, 0.9)
        assert len(cfg.param_scheduler) == 1
    else:
        head = cfg.model.decode_head
        assert head.type == HEADS[name['head']]
        assert head.in_channels == [widths[i] for i in head.in_index]
        assert rates == (6e-5, 0.01, 1)
        assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == 0
        warm_up = cfg.param_scheduler[0]
        assert (warm_up.type, warm_up.end, warm_up.start_factor) == ('LinearLR', 1500, 1e-6)
    if name['head'] == 'upernet':
        assert cfg.model.auxiliary_head.in_channels == widths[2]
        assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4


OWN = dict(type='BaseSegDataset', img_suffix='.png', metainfo=dict(classes=['a', 'b', 'c']))


@pytest.mark.parametrize(
    ('config', 'dataset', 'expected'),
    [
        (ADE20K, dict(img_suffix='.png'), [255, 0, 1]),
        (ADE20K, OWN, [0, 1, 2]),
        ('demo/lska-van-tiny_fpn_nuclei.py', {}, [255, 0, 1]),
        ('demo/lska-van-tiny_fpn_nuclei.py', dict(reduce_zero_label=False), [0, 1, 2]),
        ('demo/lska-van-tiny_fpn_nuclei-4bands.py', {}, [255, 0, 1]),
    ],
)
def test_the_data_set_says_how_labels_count(config, dataset, expected, tmp_path):
    """In training, in tests, and in `--tta`, of the config or by default."""
    from mmseg.registry import DATASETS

    init_default_scope('mmseg')
    labels = np.tile(np.uint8([0, 1, 2, 255]), (64, 16))
    mmcv.imwrite(labels, f'{tmp_path}/labels/a.png')
    mmcv.imwrite(np.dstack([labels] * 4), f'{tmp_path}/images/a.png')
    expected = np.select([labels == 0, labels == 1, labels == 2], expected, 255)

    cfg = Config.fromfile(ROOT / config)
    pipelines = dict(
        train=cfg.train_dataloader.dataset.pipeline, test=cfg.test_pipeline, tta=cfg.tta_pipeline
    )
    cfg.pop('tta_pipeline')
    load_tool('tools/test.py').enable_tta(cfg)
    pipelines['default'] = cfg.test_dataloader.dataset.pipeline
    for name, pipeline in pipelines.items():
        data = {**cfg.test_dataloader.dataset, **dataset, 'pipeline': pipeline}
        data['data_prefix'] = dict(img_path='images', seg_map_path='labels')
        samples = DATASETS.build({**data, 'data_root': str(tmp_path)})[0]['data_samples']
        found = (samples[0] if isinstance(samples, list) else samples).gt_sem_seg
        if name == 'train':  # cut and resized
            assert set(found.data.unique().tolist()) == set(expected.flat)
        else:  # those of the first view are what mmseg compares with
            assert np.array_equal(found.data[0], expected)


@configs('classification')
def test_classification_recipe(path):
    cfg = Config.fromfile(path)
    arch = re.fullmatch(NAMES['classification'], path.stem)['arch']
    assert cfg.model.head.in_channels == WIDTHS[arch][-1]
    assert cfg.train_cfg.max_epochs == 310
    assert '_scope_' not in cfg.visualizer  # mmpretrain's browse_dataset.py would not take it
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert cfg.data_preprocessor.mean == cfg.data_preprocessor.std == [127.5] * 3
    _, resize, crop, _ = cfg.test_dataloader.dataset.pipeline
    assert (resize.scale, resize.edge, crop.crop_size) == (248, 'short', 224)
    mixup, cutmix = cfg.model.train_cfg.augments
    assert (mixup.alpha, cutmix.alpha) == (0.8, 1.0)
    assert cfg.model.head.loss.label_smooth_val == 0.1


def test_averaged_weights_follow_a_short_training(run, tmp_path):
    """After eight steps they are nearer to the trained ones than those were two steps before."""
    cfg = classifier(tmp_path, tmp_path / 'work')
    cfg.custom_hooks = Config.fromfile(ROOT / 'configs/classification/_base_/ema.py').custom_hooks
    cfg.dump(tmp_path / 'ema.py')
    run('python', 'tools/train.py', tmp_path / 'ema.py')
    before, end = (
        torch.load(tmp_path / f'work/iter_{step}.pth', weights_only=False) for step in (6, 8)
    )
    name = 'backbone.block1.0.mlp.fc1.weight'
    averaged, trained = end['state_dict'][name], end['ema_state_dict'][f'module.{name}']
    assert not torch.equal(averaged, trained)
    step = (before['ema_state_dict'][f'module.{name}'] - trained).norm()
    assert (averaged - trained).norm() < step


def test_folder_of_the_weights_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv('LSKA_PRETRAINED', '/my/weights')
    checkpoint = Config.fromfile(RETINANET).model.backbone.init_cfg.checkpoint
    assert checkpoint.startswith('/my/weights/lska-van-')


@pytest.mark.parametrize(
    'path',
    [  # another size or kernel is the same code
        pytest.param(path, marks=[pytest.mark.soak] * bool(SIZES.search(path.stem)))
        for path in CONFIGS
    ],
    ids=lambda path: path.stem,
)
def test_trains_one_step(path):
    cfg = Config.fromfile(path)
    train_one_step(cfg, DATA[cfg.default_scope])
