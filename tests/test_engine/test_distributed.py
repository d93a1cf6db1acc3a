"""Two processes without a GPU train as one process with the same global batch.

A small classifier on handwritten digits, without random transforms, drop path or
dropout, its BatchNorm frozen: nothing differs but the order of the sums.
"""

import re
import signal
import time

import psutil
import pytest
import torch
from mmengine.config import Config
from torch import nn

from conftest import ROOT
from lska_mm import CPUDistributedDataParallel
from lska_mm.engine.distributed import init_cpu
from lska_mm.engine.hooks import EXIT_CODE
from trainings import ARCH

CONFIG = """
_base_ = '{root}/demo/lska-van-tiny_digits.py'
custom_hooks = [dict(type='SaveOnSignalHook')]
model = dict(
    backbone=dict(arch={arch}, kernel_size=11, norm_eval=True, drop_path_rate=0),
    head=dict(in_channels=8))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
data = dict(data_root='{data}', pipeline=pipeline)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(indices=48, **data), **loader)
val_dataloader = test_dataloader = dict(batch_size=8, dataset=dict(indices=16, **data), **loader)
train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = dict(_delete_=True, type='ConstantLR', factor=1.0)
default_hooks = dict(logger=dict(interval=1))
env_cfg = dict(dist_cfg=dict(timeout=60))
sync_bn = 'torch'
"""


@pytest.fixture(scope='module')
def job(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('job')
    run('python', 'tools/dataset_converters/digits.py', '--out', folder / 'digits')
    arch = {'_delete_': True, **ARCH}
    text = CONFIG.format(root=ROOT, data=folder / 'digits', arch=arch)
    (folder / 'config.py').write_text(text)
    return folder


def train(run, job, name, processes, *arguments, **how):
    """Train in so many processes with 16 images a step together; what was printed."""
    options = ['--cfg-options', f'train_dataloader.batch_size={16 // processes}']
    arguments = [job / 'config.py', '--work-dir', job / name, *arguments, *options]
    if processes == 1:
        return run('python', 'tools/train.py', *arguments, OMP_NUM_THREADS='1', **how)
    arguments.insert(1, processes)
    return run('bash', 'tools/dist_train.sh', *arguments, OMP_NUM_THREADS='1', PORT='29611', **how)


def test_two_processes_train_and_test_as_one(run, job):
    printed = train(run, job, 'two', 2)
    assert 'Distributed launcher: pytorch' in printed
    assert 'Without a GPU, SyncBN is plain BatchNorm' in printed
    train(run, job, 'one', 1)
    one, two = (
        torch.load(job / name / 'epoch_4.pth', weights_only=False) for name in ('one', 'two')
    )
    moments = [
        [state['exp_avg_sq'] for state in content['optimizer']['state'].values()]
        for content in (one, two)
    ]
    largest = max((a - b).abs().max().item() for a, b in zip(*moments))
    # Biases before a norm have no gradient but noise, which Adam blows up: weights alone.
    weights = [key for key, value in one['state_dict'].items() if value.dim() > 1]
    difference = max(
        (one['state_dict'][key] - two['state_dict'][key]).abs().max().item() for key in weights
    )
    print(f'two processes: weights differ by {difference:.1e}, squared gradients by {largest:.1e}')
    assert difference < 1e-5
    assert largest < 1e-6
    command = ('bash', 'tools/dist_test.sh', job / 'config.py', job / 'two/epoch_4.pth', 2)
    tested = run(*command, '--work-dir', job / 'test', OMP_NUM_THREADS='1', PORT='29612')
    accuracy = [re.findall(r'accuracy/top1: (\S+)', text)[-1] for text in (printed, tested)]
    assert accuracy[0] == accuracy[1]


def test_a_signal_to_one_process_saves_and_resume_goes_on(run, job, popen):
    """It comes to the last of the two; all end after the same step."""
    command = ['bash', 'tools/dist_train.sh', job / 'config.py', '2', '--work-dir', job / 'asked']
    more = ['train_dataloader.batch_size=8', 'train_cfg.max_epochs=10000']
    process, log = popen(*command, '--cfg-options', *more, PORT='29613', OMP_NUM_THREADS='1')
    end = time.monotonic() + 120
    while 'Epoch(train)' not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if 'tools/train.py' in ' '.join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[-1].send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 1  # torchrun's own
    assert f'exitcode  : {EXIT_CODE}' in log.read_text()
    saved = torch.load((job / 'asked/last_checkpoint').read_text(), weights_only=False)['meta']
    more[1] = f'train_cfg.max_epochs={saved["epoch"] + 1}'
    more[0] = 'train_dataloader.batch_size=16'
    command[:4] = ['python', 'tools/train.py', job / 'config.py']
    printed = run(*command, '--resume', '--cfg-options', *more, OMP_NUM_THREADS='1')
    assert f'resumed epoch: {saved["epoch"]}, iter: {saved["iter"]}' in printed


def test_a_wrapper_of_the_config_stays(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *_, **__: None)
    cfg = Config(dict(launcher='pytorch', model_wrapper_cfg=dict(type='Mine')))
    init_cpu(cfg)
    assert cfg.model_wrapper_cfg == dict(type='Mine')
    cfg = Config(dict(launcher='pytorch', find_unused_parameters=True))
    init_cpu(cfg)
    assert cfg.model_wrapper_cfg.type == 'CPUDistributedDataParallel'
    assert cfg.model_wrapper_cfg.find_unused_parameters
    cfg = Config(dict(launcher='none'))
    init_cpu(cfg)
    assert 'model_wrapper_cfg' not in cfg


def test_sync_bn_of_any_norm_cfg_becomes_plain(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
        wrapped = CPUDistributedDataParallel(model)
        assert not [m for m in wrapped.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert wrapped(torch.rand(2, 3, 4, 4)).isfinite().all()
    finally:
        torch.distributed.destroy_process_group()
