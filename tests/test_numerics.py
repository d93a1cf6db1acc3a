"""Mixed precision, recomputation, and losses that are not numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from conftest import ROOT
from lska_mm.hooks import NonFiniteError
from trainings import classifier, detector, segmentor, train

TASKS = dict(detector=detector, segmentor=segmentor, classifier=classifier)


class Losses(Hook):
    """Keeps the loss of each step."""

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append(outputs['loss'].item())


def losses(cfg):
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update({key: 3 for key in ('max_iters', 'max_epochs') if key in cfg.train_cfg})
    hook = Losses()
    train(cfg, hook=hook)
    return torch.tensor(hook.values)


@pytest.mark.parametrize('task', TASKS)
def test_half_precision_and_recomputation_follow_float32(task, nuclei, tmp_path):
    data = tmp_path if task == 'classifier' else nuclei
    plain = losses(TASKS[task](data, tmp_path / 'plain'))
    cfg = TASKS[task](data, tmp_path / 'recomputed')
    cfg.model.backbone.with_cp = True
    assert torch.allclose(losses(cfg), plain, rtol=1e-3)
    for dtype in ('bfloat16', 'float16'):
        cfg = TASKS[task](data, tmp_path / dtype)
        # What --amp takes on a CPU, there in bfloat16.
        cfg.optim_wrapper.update(type='AutocastOptimWrapper', dtype=dtype)
        if task == 'detector':
            refusal = r'RoIAlign has no bfloat16.*without --amp'
        elif dtype == 'float16' and torch.__version__.startswith('2.1.'):
            refusal = 'AutocastCPU only support Bfloat16'
        else:
            half = losses(cfg)
            print(f'{task}, {dtype}: losses differ by {(half / plain - 1).abs().max():.1e}')
            assert not torch.equal(half, plain)
            assert torch.allclose(half, plain, rtol=0.05)
            continue
        with pytest.raises((TypeError, RuntimeError), match=refusal):
            losses(cfg)


# --- Not a number ----------------------------------------------------------------


class Sabotage(Hook):
    """Makes a value infinite or not a number, at the end of the second step."""

    def __init__(self, act):
        self.act = act

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            self.act(runner.model)


def divide_by_zero(model):
    model.backbone.block2[0].mlp.register_forward_hook(lambda module, inputs, output: output / 0)


def spoil_gradient(model):
    model.backbone.norm3.weight.register_hook(lambda gradient: gradient * float('nan'))


def spoil_weight(model):
    model.decode_head.conv_seg.bias.data[1] = float('inf')


@pytest.mark.parametrize(
    ('act', 'message'),
    [
        (
            divide_by_zero,
            r'Step 3: the loss is not finite, from backbone\.block2\.0\.mlp \(MLP\), the first '
            r'module with such values; losses concerned: decode\.loss_ce\. The learning rate is',
        ),
        (
            spoil_gradient,
            r'Step 4: the loss is not finite, since the step before made weights so '
            r'\(first: backbone\.norm3\.weight\)\..*lower it, warm up for longer, or clip',
        ),
        (
            spoil_weight,
            r'Step 2: the weights are not finite \(first: decode_head\.conv_seg\.bias\), so '
            r'no checkpoint was written',
        ),
    ],
)
def test_a_non_finite_value_is_traced(act, message, nuclei, tmp_path):
    cfg = segmentor(nuclei, tmp_path)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.default_hooks.checkpoint.interval = 8 if act is spoil_gradient else 2
    with pytest.raises(NonFiniteError, match=message):
        train(cfg, hook=Sabotage(act))
    written = {file.stem for file in tmp_path.glob('*.pth')}
    assert written == ({'iter_2'} if act is divide_by_zero else set())


# --- The long form ---------------------------------------------------------------

RECIPES = {
    'float32': [],
    'bfloat16': ['--amp'],
    'float16': ['--amp', '--cfg-options', 'optim_wrapper.dtype=float16'],
    'with_cp': ['--cfg-options', 'model.backbone.with_cp=True'],
}


def small_segmentor(nuclei, tmp_path):
    """Blocks of 8 channels: float16 is too slow on a CPU for the whole demo."""
    cfg = segmentor(nuclei, tmp_path)
    cfg.train_cfg.update(max_iters=400, val_interval=400)
    cfg.param_scheduler[0].end = cfg.default_hooks.checkpoint.interval = 400
    cfg.optim_wrapper.optimizer.lr = 2e-3
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.dump(tmp_path / 'small.py')
    return tmp_path / 'small.py'


@pytest.mark.soak
@pytest.mark.parametrize(
    ('config', 'metric', 'recipes'),
    [
        ('demo/lska-van-tiny_fpn_nuclei.py', 'mIoU', ['bfloat16', 'with_cp']),
        # Without bfloat16, see above.
        ('demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py', 'coco/segm_mAP', ['with_cp']),
        (small_segmentor, 'mIoU', ['bfloat16', 'float16', 'with_cp']),
    ],
)
def test_other_precisions_reach_the_same(config, metric, recipes, nuclei, run, tmp_path):
    """Whole trainings; within 2 points of float32."""
    if config is small_segmentor:
        config = small_segmentor(nuclei, tmp_path)
    run('python', 'tools/dataset_converters/nuclei.py', '--out', 'data/nuclei')
    scores = {}
    for name in ['float32', *recipes]:
        run('python', 'tools/train.py', config, '--work-dir', tmp_path / name, *RECIPES[name])
        (log,) = (tmp_path / name).glob('*/vis_data/scalars.json')
        lines = map(json.loads, log.read_text().splitlines())
        score = [line[metric] for line in lines if metric in line][-1]
        scores[name] = score * 100 if 'mAP' in metric else score
        print(f'{Path(config).stem} {name}: {metric} {scores[name]:.2f}')
    assert all(abs(score - scores['float32']) < 2 for score in scores.values())


@pytest.mark.soak
@pytest.mark.parametrize('config', ['demo/lska-van-tiny_fpn_nuclei.py'])
def test_ten_times_the_learning_rate(config, run, tmp_path):
    """Ends well, or stops and says where the first value broke."""
    run('python', 'tools/dataset_converters/nuclei.py', '--out', 'data/nuclei')
    command = f'python tools/train.py {config} --work-dir {tmp_path} --cfg-options '
    printed = run('bash', '-c', f'{command} optim_wrapper.optimizer.lr=5e-3 || true', cwd=ROOT)
    losses = re.findall(r'loss: (\S+)', printed)
    print(f'{len(losses)} losses logged, the last {losses[-1]}')
    assert 'nan' not in losses or 'NonFiniteError' in printed
