"""The tools as a user runs them: real processes, real data, the real Runner."""

import json
import os
import pickle
import re
import shutil
import stat
from importlib.util import find_spec
from pathlib import Path

import mmcv
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT

DEMO = 'demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py'
RETINANET = 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'


def shrink(nuclei, *more):
    """Options that leave of the demo one iteration an epoch and one epoch."""
    root = f'{nuclei}/coco/'
    options = [
        'train_dataloader.dataset.times=2',
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.logger.interval=1',
    ]
    options += [f'{split}_dataloader.dataset.data_root={root}' for split in ('val', 'test')]
    options += [f'train_dataloader.dataset.dataset.data_root={root}']
    options += [
        f'{split}_evaluator.ann_file={root}annotations/val.json' for split in ('val', 'test')
    ]
    return ['--cfg-options', *options, *more]


def coco_options(root):
    """Options that make a COCO config read its data from ``root``, in this process."""
    options = [
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in (f'dataset.data_root={root}/', 'num_workers=0', 'persistent_workers=False')
    ]
    ann_file = f'{root}/annotations/instances_val2017.json'
    options += [f'{split}_evaluator.ann_file={ann_file}' for split in ('val', 'test')]
    return ['--cfg-options', *options]


# --- The demo, from beginning to end -------------------------------------------


@pytest.fixture(scope='module')
def demo(train_demo):
    options = ('train_dataloader.dataset.times=32', 'train_cfg.max_epochs=3')
    return train_demo('detection', *options)


def test_demo_ends_with_its_aps_and_pictures(demo):
    out, printed = demo
    *_, bbox, bbox_50, segm, segm_50, prediction, curve = printed.strip().splitlines()
    lines = (bbox, bbox_50, segm, segm_50)
    for line, name in zip(lines, ('bbox AP', 'bbox AP50', 'segm AP', 'segm AP50')):
        assert re.fullmatch(rf'{name}: 0\.\d{{3}}', line)
    assert float(segm_50.split()[-1]) > 0.3
    for line, name in ((prediction, 'prediction.png'), (curve, 'training_curve.png')):
        path = Path(line.split(': ')[1])
        assert path == out / name
        height, width = mmcv.imread(str(path)).shape[:2]
        assert min(height, width) > 400


def test_the_demos_detector_is_exported(demo, run, tmp_path):
    """Boxes, labels and masks as PyTorch has them, or a line that says what it takes."""
    words = (DEMO, demo[0] / 'epoch_3.pth', tmp_path / 'out.onnx')
    tool = ('python', 'tools/deployment/export_onnx.py', *words)
    if find_spec('mmdeploy') is None:
        assert 'which goes with the original stack' in run(*tool, code=1)
        return
    tile = mmcv.imread(str(ROOT / 'demo/nuclei/image.png'))[:160, 352:]
    mmcv.imwrite(tile, str(tmp_path / 'tile.png'))
    printed = run(*tool, '--image', tmp_path / 'tile.png')
    line = r'^image .*: (\d+) detections .*: box (\S+), score (\S+), masks (\S+)$'
    found = re.findall(line, printed, re.MULTILINE)
    assert len(found) == 2  # images, of two sizes
    for number, box, score, masks in found:
        assert int(number) > 3
        assert float(box) <= 0.5
        assert float(score) <= 1e-3
        assert float(masks) <= 0.05


def test_resume_goes_on_where_it_stopped(demo, run, nuclei, tmp_path):
    shutil.copytree(demo[0], tmp_path, dirs_exist_ok=True)
    options = shrink(nuclei, 'train_cfg.max_epochs=4')
    printed = run('python', 'tools/train.py', DEMO, '--work-dir', tmp_path, '--resume', *options)
    assert 'resumed epoch: 3' in printed
    assert 'Epoch(train) [4][1/1]' in printed
    assert 'Epoch(train) [3]' not in printed


def test_test_dumps_and_draws(demo, run, tmp_path):
    out, printed = demo
    checkpoint = out / 'epoch_3.pth'
    outputs = ('--out', tmp_path / 'predictions.pkl', '--show-dir', tmp_path / 'shown')
    again = run('python', 'tools/test.py', DEMO, checkpoint, '--work-dir', tmp_path, *outputs)
    aps = [re.findall(r'coco/segm_mAP: (\S+)', text)[-1] for text in (printed, again)]
    assert aps[0] == aps[1]
    (prediction,) = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    instances = prediction['pred_instances']
    assert len(instances['masks']) == len(instances['scores'])
    (picture,) = (tmp_path / 'shown').rglob('*.png')
    assert mmcv.imread(str(picture)) is not None


SCALES = [
    f'tta_pipeline.1.transforms.0.{i}.scale=({side},{side})' for i, side in enumerate((96, 64, 32))
]


@pytest.mark.parametrize(
    ('config', 'options'),
    [
        (RETINANET, SCALES),
        (RETINANET.replace('retinanet', 'atss'), ['test_pipeline.1.scale=(96,96)']),  # by default
    ],
    ids=['scales_and_flips', 'flips'],
)
def test_tta(config, options, run, coco, tmp_path):
    """Of random weights."""
    from mmdet.apis import init_detector

    cfg = Config.fromfile(ROOT / config)
    cfg.model.backbone.init_cfg = None
    detector = init_detector(cfg, palette='random', device='cpu')
    torch.save(dict(state_dict=detector.state_dict()), tmp_path / 'random.pth')
    printed = run(
        'python', 'tools/test.py', config, tmp_path / 'random.pth', '--tta',
        '--work-dir', tmp_path, *coco_options(coco), *options,
    )  # fmt: skip
    assert 'coco/bbox_mAP' in printed
    assert "type='DetTTAModel'" in printed


# --- Launchers; test_engine/test_distributed.py trains in two processes -----------


@pytest.mark.parametrize(
    'command',
    ['dist_train.sh x', 'dist_train.sh x two', 'dist_test.sh x x', 'dist_test.sh x x 0',
     'slurm_train.sh x x x', 'slurm_test.sh x x x'],
)  # fmt: skip
def test_scripts_say_how_they_are_used(run, command):
    script, *words = command.split()
    printed = run('bash', f'tools/{script}', *words, code=2)
    assert printed.startswith(f'usage: bash tools/{script} ')


@pytest.mark.parametrize('script', (ROOT / 'demo').glob('*.sh'), ids=lambda path: path.name)
def test_help_of_a_demo_is_all_that_it_does(run, script):
    printed = run('bash', script, '--work-dir', 'x', '--help')
    assert f'bash demo/{script.name} [arguments of train.py' in printed
    assert len(printed.splitlines()) < 10


@pytest.mark.parametrize(
    ('script', 'end'),
    [
        ('slurm_train.sh', 'tools/train.py|a.py|--work-dir|b c|--launcher|slurm|--amp|'),
        ('slurm_test.sh', 'tools/test.py|a.py|b c|--launcher|slurm|--amp|'),
    ],
)
def test_slurm_command_line(run, tmp_path, script, end):
    """There is no cluster here: this checks what `srun` would be given."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    words = ('bash', f'tools/{script}', 'gpu', 'job', 'a.py', 'b c', '--amp')
    path = f'PATH={tmp_path}:{os.environ["PATH"]}'
    printed = run('env', path, *words, GPUS='16', SRUN_ARGS='--quiet --mem=8G')
    assert printed.startswith(
        '--partition=gpu|--job-name=job|--gres=gpu:8|--ntasks=16|--ntasks-per-node=8|'
    )
    assert '|--quiet|--mem=8G|python|-u|' in printed
    assert printed.endswith(end)


def test_auto_scale_lr(run, nuclei, tmp_path):
    command = ('python', 'tools/train.py', DEMO, '--work-dir', tmp_path, '--auto-scale-lr')
    printed = run(*command, *shrink(nuclei))
    assert 'LR is set based on batch size of 16 and the current batch size is 2' in printed
    record = json.loads(next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()[0])
    assert 0 < record['lr'] < 5e-4 / 8
