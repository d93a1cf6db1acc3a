"""Several hosts are network namespaces of this machine, a virtual cable between them.

What they train is checked against one process with the same global batch: a
small classifier on handwritten digits without random transforms, drop path or
dropout. Its BatchNorm takes the statistics of the global batch (`sync_bn`), so
nothing differs but the order of the sums.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from conftest import ROOT
from lska_mm.distributed import connect

HOSTS = ('10.77.0.1', '10.77.0.2')
CONFIG = """
_base_ = '{root}/demo/lska-van-tiny_digits.py'
custom_imports = dict(imports=['lska_mm', 'losses'], allow_failed_imports=False)
custom_hooks = [dict(type='WriteLosses')]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=[8, 16], depths=[1, 1], ffn_ratios=[2, 2]),
        kernel_size=11, out_indices=(1,), drop_path_rate=0,
    ),
    head=dict(in_channels=16),
)
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs'),
]
loader = dict(num_workers=0, persistent_workers=False)
data = dict(data_root='{data}', pipeline=pipeline)
train_dataloader = dict(batch_size=8, dataset=dict(indices=48, **data), **loader)
val_dataloader = dict(batch_size=8, dataset=dict(indices=16, **data), **loader)
train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = dict(_delete_=True, type='ConstantLR', factor=1.0)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
env_cfg = dict(dist_cfg=dict(timeout=20))
sync_bn = 'torch'
"""
LOSSES = """
import os, time
from mmengine.dist import all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class WriteLosses(Hook):
    '''Appends the loss of each iteration's global batch to a file.'''

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, 'mean')
        if get_rank() == 0:
            with open(os.path.join(runner.work_dir, 'losses.txt'), 'a') as file:
                file.write(f'{runner.iter} {loss.item():.9f}\\n')
        time.sleep(float(os.environ.get('PAUSE', 0)))
"""


class Job:
    """A config, and ways to train it."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.config = folder, folder / 'config.py'
        self.config.write_text(CONFIG.format(root=ROOT, data=data))
        (folder / 'losses.py').write_text(LOSSES)

    def environ(self, **env):
        path = os.pathsep.join([str(self.folder), str(ROOT), os.environ.get('PYTHONPATH', '')])
        binaries = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
        return {
            **os.environ, 'PYTHONPATH': path, 'PATH': binaries, 'OMP_NUM_THREADS': '1', **env,
        }  # fmt: skip

    def one(self, name, batch, *options):
        """Train in one process."""
        result = subprocess.run(
            ['python', 'tools/train.py', self.config, '--work-dir', self.folder / name,
             '--cfg-options', f'train_dataloader.batch_size={batch}', *options],
            cwd=ROOT, env=self.environ(), check=False, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-5000:]
        return self.losses(name)

    def start(self, name, *arguments, prefix=(), processes=1, **env):
        """Begin `dist_train.sh`; what it prints goes to a file."""
        log = (self.folder / f'{name}-{env.get("NODE_RANK", 0)}.log').open('a')
        return subprocess.Popen(
            [*prefix, 'bash', 'tools/dist_train.sh', self.config, str(processes),
             '--work-dir', self.folder / name, *arguments],
            cwd=ROOT, env=self.environ(**env), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def printed(self, name, host=0):
        return (self.folder / f'{name}-{host}.log').read_text()

    def losses(self, name):
        """Of each iteration, the last if it was repeated."""
        path = self.folder / name / 'losses.txt'
        lines = path.read_text().splitlines() if path.exists() else []
        return {int(line.split()[0]): float(line.split()[1]) for line in lines}

    def state(self, name):
        content = torch.load(self.folder / name / 'epoch_4.pth', weights_only=False)
        # FlexibleRunner keeps DDP's prefix.
        return {key.removeprefix('module.'): v for key, v in content['state_dict'].items()}


class Network:
    """Two hosts with a cable between them."""

    def __init__(self, name):
        self.names = [f'{name}-{i}' for i in range(2)]
        self.ip('link', 'add', 'lska0', 'netns', self.names[0], 'type', 'veth',
                'peer', 'name', 'lska0', 'netns', self.names[1])  # fmt: skip
        for host, address in zip(self.names, HOSTS):
            self.ip('-n', host, 'address', 'add', f'{address}/24', 'dev', 'lska0')
            for device in ('lo', 'lska0'):
                self.ip('-n', host, 'link', 'set', device, 'up')

    @staticmethod
    def ip(*words):
        return subprocess.run(['ip', *words], check=True, text=True, capture_output=True).stdout

    def start(self, job, name, *arguments, **env):
        """Begin a job on both hosts."""
        return [
            job.start(
                name, *arguments, prefix=('ip', 'netns', 'exec', host), NNODES='2',
                NODE_RANK=str(rank), MASTER_ADDR=HOSTS[0], GLOO_SOCKET_IFNAME='lska0', **env,
            )
            for rank, host in enumerate(self.names)
        ]  # fmt: skip

    def kill(self, host):
        """End everything on a host at once."""
        for pid in self.ip('netns', 'pids', self.names[host]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self):
        for host, name in enumerate(self.names):
            self.kill(host)
            self.ip('netns', 'delete', name)


@pytest.fixture(scope='module')
def network():
    name = f'lska-{os.getpid()}'
    try:
        for i in range(2):
            Network.ip('netns', 'add', f'{name}-{i}')
        made = Network(name)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, 'stderr', '') or error
        pytest.skip(f'no network namespaces here, they need root and iproute2: {reason}')
    yield made
    made.close()


@pytest.fixture(scope='module')
def job(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('job')
    run('python', 'tools/dataset_converters/digits.py', '--out', folder / 'digits')
    return Job(folder, folder / 'digits')


@pytest.fixture(scope='module')
def expected(job):
    """The losses of one process with the global batch."""
    return job.one('one', 16)


def wait_for_epoch_2(job, name, processes):
    while not (job.folder / name / 'epoch_2.pth').exists():
        for host, process in enumerate(processes):
            assert process.poll() is None, job.printed(name, host)[-5000:]
        time.sleep(0.1)


def wait(processes, job, name, code=0):
    for host, process in enumerate(processes):
        assert process.wait(timeout=150) == code, job.printed(name, host)[-5000:]


def difference(job, name, expected):
    """The largest of the losses, and of the variances that BatchNorm has seen.

    Biases before a norm have no gradient but noise, which Adam blows up.
    """
    losses, state, one = job.losses(name), job.state(name), job.state('one')
    assert losses.keys() == expected.keys()
    loss = max(abs(losses[i] - expected[i]) for i in losses)
    keys = [key for key in one if key.endswith('running_var')]
    variance = max((state[key] - one[key]).abs().max().item() for key in keys)
    print(f'{name}: losses differ by {loss:.1e}, variances in {len(keys)} norms by {variance:.1e}')
    return max(loss, variance)


def test_a_host_is_killed_and_the_job_goes_on(network, job, expected):
    processes = network.start(job, 'killed', PAUSE='0.5')
    wait_for_epoch_2(job, 'killed', processes)
    network.kill(1)
    begin = time.monotonic()
    assert processes[0].wait(timeout=60) == 1
    print(f'killed: the other host ended after {time.monotonic() - begin:.1f} s')
    assert 'LostRankError: Rank 0 stops: rank 1 of 2 shows no sign of life' in job.printed(
        'killed'
    )
    wait(network.start(job, 'killed', '--resume'), job, 'killed')
    assert 'resumed epoch: ' in job.printed('killed')
    assert difference(job, 'killed', expected) < 1e-4


@pytest.mark.soak
def test_the_first_host_is_killed(network, job, expected):
    processes = network.start(job, 'first', PAUSE='0.5')
    wait_for_epoch_2(job, 'first', processes)
    network.kill(0)
    begin = time.monotonic()
    assert processes[1].wait(timeout=60) == 1
    print(f'first killed: the other host ended after {time.monotonic() - begin:.1f} s')
    assert 'the host of rank 0 does not answer (MASTER_ADDR 10.77.0.1:' in job.printed('first', 1)
    wait(network.start(job, 'first', '--resume'), job, 'first')
    assert difference(job, 'first', expected) < 1e-4


@pytest.mark.soak
def test_the_cable_is_cut(network, job, expected):
    processes = network.start(job, 'cut', PAUSE='0.5')
    wait_for_epoch_2(job, 'cut', processes)
    network.ip('-n', network.names[1], 'link', 'set', 'lska0', 'down')
    begin = time.monotonic()
    try:
        for process in processes:
            assert process.wait(timeout=90) == 1
            print(f'cut: a host ended after {time.monotonic() - begin:.1f} s')
    finally:
        network.ip('-n', network.names[1], 'link', 'set', 'lska0', 'up')
    assert 'Rank 0 stops: rank 1 of 2 shows no sign of life' in job.printed('cut')
    assert 'Rank 1 stops: the host of rank 0 does not answer' in job.printed('cut', 1)
    wait(network.start(job, 'cut', '--resume'), job, 'cut')
    assert difference(job, 'cut', expected) < 1e-4


def test_an_attempt_does_not_see_keys_of_the_one_before(monkeypatch):
    """In the store that torchrun keeps between them."""
    server = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True)
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', str(server.port))
    stores = []
    for attempt in ('0', '1'):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', attempt)
        stores.append(connect())
    assert [store.add('key', 1) for store in stores] == [1, 1]


def test_sigterm_to_the_launcher_saves(job, expected):
    """As a container's engine sends it, to its first process alone."""
    process = job.start('asked', processes=2, PORT='29633', PAUSE='0.5')
    wait_for_epoch_2(job, 'asked', [process])
    process.terminate()
    wait([process], job, 'asked', code=1)
    assert (job.folder / 'asked/interrupted.pth').exists()
    assert 'Exit code 75' in job.printed('asked')
    wait([job.start('asked', '--resume', processes=2, PORT='29633')], job, 'asked')
    assert difference(job, 'asked', expected) < 1e-4


@pytest.mark.soak
def test_torchrun_restarts(job, expected):
    """A process is killed, and all start anew from the last checkpoint by themselves."""
    process = job.start('restarts', '--resume', processes=2, PORT='29631', PAUSE='0.5',
                        MAX_RESTARTS='1')  # fmt: skip
    wait_for_epoch_2(job, 'restarts', [process])
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if 'tools/train.py' in child.cmdline()
    ]
    workers[-1].kill()
    wait([process], job, 'restarts')
    assert re.search(r'resumed epoch: [23]', job.printed('restarts'))
    assert difference(job, 'restarts', expected) < 1e-4


FLEXIBLE = ['runner_type=FlexibleRunner']
DDP = [*FLEXIBLE, 'strategy.type=DDPStrategy', 'strategy.sync_bn=torch']
FSDP = [*FLEXIBLE, 'strategy.type=FSDPStrategy', 'strategy.state_dict_cfg=full']


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        pytest.param('ddp', ['randomness.seed=0'], marks=pytest.mark.soak),
        pytest.param(
            'accumulated', ['optim_wrapper.accumulative_counts=3'], marks=pytest.mark.soak
        ),
        pytest.param('flexible', DDP, marks=pytest.mark.soak),
        ('fsdp', [*FSDP, 'sync_bn=None']),
    ],
)
def test_ways_to_train_in_two_processes(job, name, options):
    """Half of it, and after --resume the rest, against one process.

    FSDP has no SyncBN in MMEngine, so its norms are frozen.
    """
    frozen = ['model.backbone.norm_eval=True'] if name == 'fsdp' else []
    one = [option for option in options if 'optim_wrapper' in option]
    expected = job.one('one', 16, *one, *frozen)
    if name == 'fsdp' and torch.__version__.startswith('2.1.'):
        process = job.start(name, '--cfg-options', *options, processes=2, PORT='29632')
        wait([process], job, name, code=1)
        assert 'FSDP of PyTorch 2.1' in job.printed(name)
        return
    for epochs in (2, 4):
        process = job.start(
            name, '--resume', '--cfg-options', *options, *frozen,
            f'train_cfg.max_epochs={epochs}', processes=2, PORT='29632',
        )  # fmt: skip
        wait([process], job, name)
    assert 'resumed epoch: 2, iter: 6' in job.printed(name)
    assert difference(job, name, expected) < 1e-4
