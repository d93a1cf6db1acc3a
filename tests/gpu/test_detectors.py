"""Detectors as users train and use them: by the tools, and mmdet's inference API."""

import importlib
from pathlib import Path

import pytest
from mmengine.config import Config

from conftest import ROOT

from .conftest import last_metric, take_training

DEMO = ROOT / 'demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py'
RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
COMPILED = dict(type='CompileHook', modules=['backbone'], dynamic=True)
# Half the AP of boxes that they have after as many steps on a CPU.
LEAST_AP = {'mask-rcnn': 0.574 / 2, 'retinanet': 0.510 / 2}
gpu = pytest.mark.gpu
USE = """
import sys, torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, checkpoint, image, device = sys.argv[1:]
model = init_detector(config, checkpoint, device=device)
kept = inference_detector(model, image).pred_instances
model.backbone.switch_to_deploy()
deployed = inference_detector(model, image).pred_instances
best = [instances.scores.topk(min(20, len(instances.scores))) for instances in (kept, deployed)]
assert (best[0].values - best[1].values).abs().max() < 1e-3
infer = DetInferencer(config, checkpoint, device=device, show_progress=False)
found = infer(image, no_save_vis=True)
assert abs(found['predictions'][0]['scores'][0] - best[0].values[0].item()) < 1e-3
print('the same by', next(model.parameters()).device.type)
"""


@pytest.fixture
def write(device, nuclei, tmp_path):
    """Write a config for the nuclei: ten epochs of 28 steps; on a CPU two steps."""

    def _write(name, *hooks):
        cfg = Config.fromfile(DEMO)
        if name == 'retinanet':
            data, cfg = cfg, Config.fromfile(RETINANET)
            take_training(cfg, data)
            cfg.model.bbox_head.num_classes = 1
            cfg.val_evaluator.metric = cfg.test_evaluator.metric = 'bbox'
        cfg.train_dataloader.dataset.dataset.data_root = f'{nuclei}/coco/'
        for split in ('val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = f'{nuclei}/coco/'
            cfg[f'{split}_evaluator'].ann_file = f'{nuclei}/coco/annotations/val.json'
        cfg.custom_hooks = [dict(hook) for hook in hooks]
        cfg.train_cfg.val_interval = cfg.train_cfg.max_epochs
        if device.type == 'cpu':
            cfg.train_dataloader.dataset.times = 8
            cfg.train_cfg.update(max_epochs=1, val_interval=1)
            cfg.param_scheduler[1].end = 2
        cfg.dump(tmp_path / 'config.py')
        return tmp_path / 'config.py'

    return _write


@pytest.mark.parametrize(
    ('name', 'hooks'),
    [
        ('mask-rcnn', []),
        pytest.param('mask-rcnn', [COMPILED], marks=gpu),
        pytest.param('retinanet', [COMPILED], marks=gpu),
        pytest.param('retinanet', [], marks=gpu),
    ],
)
def test_detector(device, write, run, nuclei, tmp_path, name, hooks):
    """In float16 on a GPU, eager and compiled; by `init_detector` and `DetInferencer`."""
    config, work_dir = write(name, *hooks), tmp_path / 'work'
    amp = ['--amp'] if device.type == 'cuda' else []
    run('python', 'tools/train.py', config, '--work-dir', work_dir, *amp)
    ap = last_metric(work_dir, 'coco/bbox_mAP')
    print(f'{name}, {"compiled" if hooks else "eager"}, {device}: AP {ap:.3f}')
    assert device.type == 'cpu' or ap >= LEAST_AP[name]
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    [image] = (nuclei / 'coco/val').iterdir()
    (tmp_path / 'use.py').write_text(USE)
    device_name = 'cuda:0' if device.type == 'cuda' else 'cpu'
    printed = run('python', tmp_path / 'use.py', config, checkpoint, image, device_name)
    assert f'the same by {device.type}' in printed


@gpu
@pytest.mark.parametrize('tool', ['mmdet', 'dist_train.sh'])
def test_other_tools(write, run, tmp_path, tool):
    config, work_dir = write('mask-rcnn'), tmp_path / 'work'
    few = ['--cfg-options', 'train_dataloader.dataset.times=16', 'train_cfg.max_epochs=1']
    if tool == 'mmdet':
        own = Path(importlib.import_module('mmdet').__file__).parent / '.mim/tools/train.py'
        run('python', own, config, '--work-dir', work_dir, '--amp', *few)
    else:
        run('bash', 'tools/dist_train.sh', config, 1, '--work-dir', work_dir, '--amp', *few)
    assert (work_dir / 'epoch_1.pth').exists()


@gpu
@pytest.mark.parametrize('first', ['cpu', 'cuda'])
def test_resume_on_the_other_device(write, run, tmp_path, first):
    config, work_dir = write('mask-rcnn'), tmp_path / 'work'
    few = ['--cfg-options', 'train_dataloader.dataset.times=8', 'train_cfg.max_epochs=1']
    for epochs, gpus in ((1, first), (2, 'cuda' if first == 'cpu' else 'cpu')):
        few[-1] = f'train_cfg.max_epochs={epochs}'
        env = {} if gpus == 'cuda' else dict(CUDA_VISIBLE_DEVICES='')
        printed = run('python', 'tools/train.py', config, '--work-dir', work_dir, '--resume',
                      *few, **env)  # fmt: skip
    assert 'resumed epoch: 1' in printed
    assert (work_dir / 'epoch_2.pth').exists()
