"""Trainings through the Runner, as they are started by hand, and the memory of a step."""

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, load_tool
from lska_mm import LSKAVAN

from .conftest import last_metric, take_training

counting = load_tool('tools/analysis_tools/counting.py')
plain_lska_van = load_tool('.dev_scripts/benchmarking/plain_lska_van.py').plain_lska_van

DIGITS = {
    'fp16': "optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')",
    'bfloat16': "optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')",
    'ema': "custom_hooks = [dict(type='EMAHook', momentum=0.02)]",
    # four blocks: to compile all of them takes minutes
    'compile': 'compile = True\nmodel = dict(backbone=dict(arch=dict('
    'embed_dims=[32, 64, 160, 256], depths=[1, 1, 1, 1], ffn_ratios=[8, 8, 4, 4])))',
}
ON_CPU = {  # mixed precision is for GPUs there, and the compiler takes minutes
    'fp16': '',
    'bfloat16': '',
    'compile': "compile = dict(backend='aot_eager')",
}


@pytest.mark.parametrize('how', DIGITS)
def test_classifier(device, run, digits, tmp_path, how):
    """The digits, in 8 epochs; on a CPU a step of them."""
    text, epochs, few = DIGITS[how], 8, []
    if device.type == 'cpu':
        text, epochs = ON_CPU.get(how, text), 1
        few = [f'{part}_dataloader.dataset.indices=32' for part in ('train', 'val', 'test')]
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{ROOT}/demo/lska-van-tiny_digits.py'\n{text}\n")
    data = [f'{part}_dataloader.dataset.data_root={digits}' for part in ('train', 'val', 'test')]
    run(
        'python', 'tools/train.py', config, '--work-dir', tmp_path / 'work',
        '--cfg-options', *data, *few,
        f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}',
        f'param_scheduler.1.end={max(epochs, 2)}',
    )  # fmt: skip
    top1 = last_metric(tmp_path / 'work', 'accuracy/top1')
    print(f'{how}, {device}: top-1 {top1:.2f} after {epochs} epochs')
    assert top1 >= (95 if device.type == 'cuda' else 0)


@pytest.mark.parametrize('head', ['fpn', pytest.param('upernet', marks=pytest.mark.gpu)])
def test_segmentor_with_sync_bn(device, run, nuclei, tmp_path, head):
    """The nuclei, by one process of torchrun: NCCL, or gloo; compiled between the norms."""
    iterations = 200 if device.type == 'cuda' else 1
    cfg = Config.fromfile(ROOT / 'demo/lska-van-tiny_fpn_nuclei.py')
    if head == 'upernet':
        data, cfg = cfg, Config.fromfile(
            ROOT / 'configs/segmentation/lska-van-tiny_upernet_8xb2-160k_ade20k-512x512.py'
        )  # fmt: skip
        take_training(cfg, data)
        cfg.model.data_preprocessor.size = data.model.data_preprocessor.size
        for part in (cfg.model.decode_head, cfg.model.auxiliary_head):
            part.num_classes = data.model.decode_head.num_classes
    cfg.sync_bn = 'torch'
    cfg.model.backbone.norm_cfg = dict(type='SyncBN')
    cfg.custom_hooks = [dict(type='CompileHook')] if head == 'upernet' else []
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = f'{nuclei}/ade'
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.dump(tmp_path / 'config.py')
    printed = run(
        'python', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=1',
        'tools/train.py', tmp_path / 'config.py', '--launcher', 'pytorch',
        '--work-dir', tmp_path / 'work',
    )  # fmt: skip
    assert ('SyncBN is plain BatchNorm' in printed) == (device.type == 'cpu')
    iou = last_metric(tmp_path / 'work', 'mIoU')
    print(f'{head}, {device}: mIoU {iou:.2f} after {iterations} iterations')
    assert iou >= (85 if device.type == 'cuda' else 0)


def test_memory_of_a_step(device):
    """Against the plain model's, at most what the saved bytes say and a tenth.

    ``with_cp`` computes the maps of a branch again: a few of the widest are there at once.
    """
    images = torch.rand(*((16, 3, 224, 224) if device.type == 'cuda' else (1, 3, 64, 64)))
    images = images.to(device)
    models = dict(plain=plain_lska_van('tiny', 23), default=LSKAVAN(out_indices=(0, 1, 2, 3)))
    models['with_cp'] = LSKAVAN(out_indices=(0, 1, 2, 3), with_cp=True)
    saved, peak = {}, {}
    for name, model in models.items():
        model = model.train().to(device)
        bare = Bare(model, model.features if name == 'plain' else model)
        saved[name] = counting.saved_bytes(bare, images)
        peak[name] = peak_of(bare, images) if device.type == 'cuda' else saved[name]
        model.to('cpu')
    for name in ('default', 'with_cp'):
        ratios = [values[name] / values['plain'] for values in (peak, saved)]
        print(f'{name}, {device}: peak {ratios[0]:.2f} of the plain one, saved {ratios[1]:.2f}')
        assert ratios[0] <= ratios[1] + (0.1 if name == 'default' else 0.2)


class Bare(torch.nn.Module):
    """A model that computes the maps of the stages alone."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x):
        return self.step(x)


def peak_of(bare, images):
    """Bytes on the GPU during forward and backward, beyond what was there before."""
    for _ in range(2):  # the first makes what stays
        bare.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sum(out.mean() for out in bare(images)).backward()
    return torch.cuda.max_memory_allocated() - before
