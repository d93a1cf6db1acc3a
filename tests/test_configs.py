"""Every config parses, is what its name says, builds and trains one step."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from conftest import ROOT
from lska_mm.models.lska_van import ARCHS

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py'))
NAME = re.compile(
    r'(?P<model>mask-rcnn|retinanet)_lska-van-(?P<arch>\w+?)(-k(?P<k>\d+))?_fpn_1x_coco'
)
DETECTORS = {'mask-rcnn': 'MaskRCNN', 'retinanet': 'RetinaNet'}
WIDTHS = dict(tiny=[32, 64, 160, 256], small=[64, 128, 320, 512], base=[64, 128, 320, 512])


def test_there_are_as_many_configs_as_promised():
    assert len(CONFIGS) == 6


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_name_agrees_with_content(path, monkeypatch):
    monkeypatch.delenv('LSKA_PRETRAINED', raising=False)
    name = NAME.fullmatch(path.stem)
    assert name, f'{path.stem} does not follow the naming scheme'
    cfg = Config.fromfile(path)
    backbone, arch, k = cfg.model.backbone, name['arch'], int(name['k'] or 23)
    assert cfg.custom_imports == dict(imports=['lska_mm'], allow_failed_imports=False)
    assert cfg.model.type == DETECTORS[name['model']]
    assert (backbone.type, backbone.arch, backbone.kernel_size) == ('LSKAVAN', arch, k)
    assert backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'pretrained/lska-van-{arch}_k{k}_in1k.pth'
    )
    assert backbone.drop_path_rate == 0.1
    assert cfg.model.neck.in_channels == ARCHS[arch]['embed_dims'] == WIDTHS[arch]
    # 1x on COCO: 12 epochs, 8 GPUs with 2 images each.
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.type, warm_up.by_epoch, warm_up.end) == ('LinearLR', False, 1000)
    assert (steps.type, steps.milestones) == ('MultiStepLR', [8, 11])
    if name['model'] == 'retinanet':
        assert (cfg.model.neck.start_level, cfg.model.neck.num_outs) == (1, 5)


def test_folder_of_the_weights_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv('LSKA_PRETRAINED', '/my/weights')
    cfg = Config.fromfile(CONFIGS[0])
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('/my/weights/lska-van-')


def test_missing_weights_are_an_error():
    from mmdet.registry import MODELS

    cfg = Config.fromfile(ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py')
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg.checkpoint = 'nowhere/lska-van-tiny_k23_in1k.pth'
    with pytest.raises(FileNotFoundError, match=r'nowhere/lska-van-tiny_k23_in1k\.pth'):
        MODELS.build(cfg.model).init_weights()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_trains_one_step(path):
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.optim import build_optim_wrapper

    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    before = model.backbone.patch_embed1.proj.weight.clone()
    data = demo_mm_inputs(2, image_shapes=[(3, 96, 128), (3, 64, 96)], with_mask=True)
    losses = model.train_step(data, build_optim_wrapper(model, cfg.optim_wrapper))
    assert losses['loss'].isfinite()
    assert not torch.equal(model.backbone.patch_embed1.proj.weight, before)
