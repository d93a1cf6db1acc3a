"""What torch and MMEngine write is read as torch itself would read it."""

import collections
import re
import sys

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.optim import scheduler as schedulers
from mmengine.runner import Runner

from lska_mm import load_from_local
from lska_mm.weights.reader import read
from pickles import VALUES, checkpoint, same, save


def trusting(path):
    """What torch reads, if it may call anything."""
    return torch.load(path, 'cpu', weights_only=False)


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_what_torch_reads(tmp_path, zipped):
    data = torch.arange(12.0)
    attributed = torch.ones(2)
    attributed.mark = True  # as FSDP does
    content = dict(
        checkpoint(),
        attributed=attributed,
        tensors=[data[2:8].view(2, 3).t(), data, torch.zeros(0, 3), torch.tensor(True)],
        expanded=torch.ones(1).expand(1000),
        types=[
            torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.complex64)
        ],
        conjugate=torch.tensor([1 + 2j]).conj(),
        parameter=torch.nn.Parameter(torch.ones(2)),
        arrays=[
            np.arange(3),
            np.array(['a', 'bc']),
            np.zeros((0, 2)),
            np.eye(2, dtype='f4').T,
            np.empty(0, object),
        ],
        scalars=[np.float32(0.5), np.int64(3), np.bool_(True), np.str_('a')],
        values=VALUES,
        others=[torch.Size([1, 2]), torch.device('cpu'), slice(1, 2), collections.deque([1])],
    )
    path = save(content, tmp_path / 'file.pth', zipped)
    ours, theirs = read(str(path)), trusting(path)
    assert same(ours, theirs)
    assert ours['state_dict']._metadata == content['state_dict']._metadata
    view, whole = ours['tensors'][:2]
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert isinstance(ours['parameter'], torch.nn.Parameter)
    save(ours, tmp_path / 'again.pth', zipped)  # as the next checkpoint of a training does
    assert same(trusting(tmp_path / 'again.pth'), theirs)


# torch 2.1 itself cannot read old files without their weights.
NOT_2_1 = pytest.mark.skipif(torch.__version__.startswith('2.1.'), reason='not in torch 2.1')


@pytest.mark.parametrize('zipped', [True, pytest.param(False, marks=NOT_2_1)])
def test_reads_on_the_device_asked_for(tmp_path, zipped):
    data = torch.arange(12.0)
    path = str(save(dict(part=data[:6], whole=data), tmp_path / 'file.pth', zipped))
    assert read(path, 'meta')['whole'].is_meta
    assert read(path, lambda storage, location: storage)['whole'].device.type == 'cpu'


# --- What MMEngine writes ------------------------------------------------------------

SCHEDULERS = dict(
    Constant=dict(factor=0.5, end=3),
    CosineAnnealing=dict(T_max=5),
    CosineRestart=dict(periods=[3, 3], restart_weights=[1, 0.5], eta_min=0),
    Exponential=dict(gamma=0.9),
    Linear=dict(start_factor=0.1, end=3),
    MultiStep=dict(milestones=[2, 2, 4], gamma=0.1),
    OneCycle=dict(eta_max=0.1, total_steps=9),
    Poly=dict(power=2, end=5),
    ReduceOnPlateau=dict(monitor='loss', patience=0),
    Step=dict(step_size=2),
)
NAMES = [name for name in schedulers.__all__ if name.endswith(('LR', 'Momentum'))]


def build_scheduler(name, **more):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    kwargs = SCHEDULERS[re.sub('LR$|Momentum$', '', name)]
    return getattr(schedulers, name)(optimizer, **kwargs, **more), optimizer.param_groups[0]


def steps(scheduler, group, number):
    settings = []
    for _ in range(number):
        scheduler.optimizer.step()
        if 'Plateau' in type(scheduler).__name__:
            scheduler.step(dict(loss=1.0))
        else:
            scheduler.step()
        settings.append((group['lr'], group['momentum']))
    return settings


@pytest.mark.parametrize(
    ('name', 'more'),
    [(name, {}) for name in NAMES] + [('OneCycleLR', dict(anneal_strategy='linear'))],
)
def test_schedulers(name, more, tmp_path):
    scheduler, group = build_scheduler(name, **more)
    steps(scheduler, group, 3)
    path = save(dict(param_schedulers=[scheduler.state_dict()]), tmp_path / 'file.pth')
    content = load_from_local(str(path))
    assert same(content, trusting(path))
    other, other_group = build_scheduler(name, **more)
    other_group.update(lr=group['lr'], momentum=group['momentum'])  # the optimizer's own state
    other.load_state_dict(content['param_schedulers'][0])
    assert steps(other, other_group, 4) == steps(scheduler, group, 4)


def test_logs_and_averages(tmp_path):
    # The log of a long training is most of what is pickled.
    buffer = HistoryBuffer(np.random.default_rng(0).random(20_000), np.ones(20_000))
    average = ExponentialMovingAverage(torch.nn.Linear(2, 2))
    average.update_parameters(torch.nn.Linear(2, 2))
    content = dict(log=buffer, ema_state_dict=average.state_dict())
    path = save(content, tmp_path / 'file.pth')
    ours = load_from_local(str(path))
    assert same(ours, trusting(path))
    assert ours['log'].statistics('mean', 100) == buffer.mean(100)
    average.load_state_dict(ours['ema_state_dict'])


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode):
        return dict(loss=self.linear(inputs.float()[:, None]).square().sum())


class Numbers(list):
    metainfo = dict(classes=('a', 'b'), palette=ConfigDict(a=dict(rgb=[1, 2, 3])))


class KeepValues(Hook):
    """Keeps values of all kinds, in the first epoch alone."""

    def before_train(self, runner):
        for key, value in VALUES.items() if runner.epoch == 0 else ():
            runner.message_hub.update_info(key, value)


def train(folder, epochs, **more):
    Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(Numbers([dict(inputs=1.0)])),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=2, by_epoch=False),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=9),
        ],
        custom_hooks=[dict(type='EMAHook'), KeepValues()],
        experiment_name=f'{folder}, {epochs}',
        **more,
    ).train()


def test_training_goes_on_from_what_is_read(tmp_path):
    train(tmp_path, 1)
    path = tmp_path / 'epoch_1.pth'
    ours = load_from_local(str(path), 'cpu')
    assert same(ours, trusting(path))
    assert ours['meta']['dataset_meta'] == Numbers.metainfo
    assert type(ours['meta']['dataset_meta']['palette']) is ConfigDict
    assert {'ema_state_dict', 'message_hub', 'optimizer', 'param_schedulers'} <= set(ours)
    train(tmp_path, 2, load_from=str(path), resume=True)
    after = load_from_local(str(tmp_path / 'epoch_2.pth'))
    assert after['ema_state_dict']['steps'] == after['meta']['iter'] == 2
    kept = after['message_hub']['runtime_info']
    assert same({key: kept[key] for key in VALUES}, VALUES)


# --- As fast as torch ----------------------------------------------------------------

MEASURE = """
import re, time
from pathlib import Path
import torch, lska_mm

def memory(key):
    return int(re.search(rf'{key}:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024

Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
before, start = memory('VmRSS'), time.perf_counter()
content = CALL
print('measured', time.perf_counter() - start, memory('VmHWM') - before)
"""


@pytest.mark.soak
def test_large(run, tmp_path):
    state_dict = {f'block{i}.weight': torch.rand(384, 384) for i in range(300)}
    moments = {
        i: dict(step=torch.tensor(9.0), exp_avg=w * 0.1, exp_avg_sq=w * w)
        for i, w in enumerate(state_dict.values())
    }
    content = dict(meta=dict(epoch=1), state_dict=state_dict, optimizer=dict(state=moments))
    torch.save(content, tmp_path / 'theirs.pth')  # weights_only refuses logs
    content['log'] = HistoryBuffer(np.random.rand(50_000), np.ones(50_000))
    torch.save(content, tmp_path / 'ours.pth')
    calls = dict(
        ours=f"lska_mm.load_from_local('{tmp_path}/ours.pth', 'cpu')",
        theirs=f"torch.load('{tmp_path}/theirs.pth', map_location='cpu', weights_only=True)",
    )
    printed = {name: [] for name in calls}
    for _ in range(3):
        for name, code in calls.items():
            out = run(sys.executable, '-c', MEASURE.replace('CALL', code))
            printed[name].append([float(x) for x in out.partition('measured')[2].split()])
    seconds, growth = ({name: min(column) for name, column in
                        ((name, list(zip(*rows))[i]) for name, rows in printed.items())}
                       for i in (0, 1))  # fmt: skip
    size = (tmp_path / 'ours.pth').stat().st_size / 1e6
    print(f'{size:.0f} MB: {seconds["ours"]:.2f} s and {growth["ours"]:.0f} MiB more at the peak, '
          f'torch {seconds["theirs"]:.2f} s and {growth["theirs"]:.0f} MiB')  # fmt: skip
    assert seconds['ours'] <= 1.2 * seconds['theirs']
    assert growth['ours'] <= 1.2 * growth['theirs']
