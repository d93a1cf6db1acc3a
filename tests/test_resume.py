"""Training that is interrupted ends like one that never was."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook

from conftest import ROOT
from lska_mm.checkpoint import CheckpointError
from lska_mm.launch import resume
from lska_mm.resume import EXIT_CODE, find_checkpoint, worker_context
from trainings import STEPS, classifier, segmentor, train


def workers(cfg, number):
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].update(num_workers=number, persistent_workers=number > 0)


class Interrupt(Hook):
    """Lets another process send SIGTERM to this one and its workers, as schedulers do."""

    def __init__(self, step):
        self.step = step
        self.others = set(multiprocessing.active_children())  # of tests before

    def workers(self):
        return {str(child.pid) for child in set(multiprocessing.active_children()) - self.others}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.step:
            workers = self.workers()
            subprocess.run(['kill', *workers, str(os.getpid())], check=True)
            time.sleep(0.5)
            assert self.workers() == workers


def assert_same(ours, theirs):
    """All tensors of two checkpoints, weights and optimizer, bit for bit."""
    ours, theirs = (torch.load(path, weights_only=False) for path in (ours, theirs))
    assert ours['meta']['iter'] == theirs['meta']['iter']
    for one, other in zip(
        [*ours['state_dict'].values(), *flat(ours['optimizer']['state'])],
        [*theirs['state_dict'].values(), *flat(theirs['optimizer']['state'])],
        strict=True,
    ):
        assert torch.equal(one, other)


def flat(state):
    return [value for entry in state.values() for value in entry.values()]


@pytest.mark.parametrize('build', [segmentor, classifier])
def test_sigterm_saves_and_training_goes_on_exactly(build, nuclei, tmp_path):
    """Without workers at a stretch, then interrupted, with two workers."""
    data = nuclei if build is segmentor else tmp_path
    whole, parts = build(data, tmp_path / 'whole'), build(data, tmp_path / 'parts')
    workers(whole, 0)
    workers(parts, 2)
    parts.train_dataloader.disable_subprocess_warning = True
    train(whole)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train(parts, hook=Interrupt(5))
    assert stop.value.code == EXIT_CODE
    parts.pop('randomness')  # the seed is in the checkpoint
    train(parts, resume(parts, 'auto'))
    assert Path(parts.load_from).name == 'interrupted.pth'
    signal.signal(signal.SIGTERM, handler)
    assert_same(*(tmp_path / run / f'iter_{STEPS}.pth' for run in ('whole', 'parts')))


def test_a_worker_that_has_just_been_started_passes_over_sigterm():
    worker = worker_context().Process(target=time.sleep, args=(0.5,))
    worker.start()
    subprocess.run(['kill', str(worker.pid)], check=True)
    worker.join()
    assert worker.exitcode == 0
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# --- Killed --------------------------------------------------------------------


def command(cfg, tmp_path, *arguments):
    cfg.dump(tmp_path / 'config.py')
    # Sums are added in another order by another number of threads.
    threads = str(torch.get_num_threads())
    environ = {**os.environ, 'OMP_NUM_THREADS': threads, 'PYTHONPATH': str(ROOT)}
    log = open(tmp_path / 'log.txt', 'a')  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, ROOT / 'tools/train.py', tmp_path / 'config.py', *arguments],
        env=environ, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def kill(process, folder, moment):
    """SIGKILL to a training and its workers at a moment of its life."""
    known = set(folder.glob('*.pth'))
    while process.poll() is None:
        if moment == 'writing' and list(folder.glob('.*.part')):
            break
        if moment == 'between' and set(folder.glob('*.pth')) - known:
            time.sleep(random.random() / 5)
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_and_compare(nuclei, tmp_path, moments):
    whole, parts = (segmentor(nuclei, tmp_path / run) for run in ('whole', 'parts'))
    steps = STEPS * len(moments)
    for cfg in (whole, parts):
        cfg.train_cfg.update(max_iters=steps, val_interval=steps)
    Path(parts.work_dir).mkdir()
    kills = 0
    for moment in itertools.cycle(moments):
        if kills == len(moments):
            break
        kills += kill(command(parts, tmp_path, '--resume'), tmp_path / 'parts', moment)
        assert find_checkpoint(parts.work_dir) or moment == 'writing'
    assert command(parts, tmp_path, '--resume').wait() == 0, (tmp_path / 'log.txt').read_text()
    train(whole)
    assert_same(
        *(tmp_path / run / f'iter_{whole.train_cfg.max_iters}.pth' for run in ('whole', 'parts'))
    )
    return kills


def test_sigkill(nuclei, tmp_path):
    assert kill_and_compare(nuclei, tmp_path, ['between']) == 1


@pytest.mark.soak
def test_ten_sigkills(nuclei, tmp_path):
    moments = ['writing', 'between'] * 5
    print(f'kills survived: {kill_and_compare(nuclei, tmp_path, moments)}')


# --- How many are kept -----------------------------------------------------------


@pytest.mark.parametrize(('keep', 'steps'), [(-1, (2, 4, 6, 8)), (3, (4, 6, 8)), (1, (8,))])
def test_checkpoints_that_are_kept(keep, steps, nuclei, tmp_path):
    cfg = segmentor(nuclei, tmp_path)
    workers(cfg, 0)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.default_hooks.checkpoint.max_keep_ckpts = keep
    train(cfg)
    assert {path.stem for path in tmp_path.glob('*.pth')} == {f'iter_{step}' for step in steps}


# --- Files ---------------------------------------------------------------------


def test_full_disk(tmp_path):
    """A disk of 1 MiB: what is there stays, the error says which disk."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], check=True)
    try:
        backend = get_file_backend(str(disk))
        backend.put(b'good', f'{disk}/iter_1.pth')
        with pytest.raises(OSError, match=rf'iter_1.pth was not written.*mounted at {disk}\.'):
            backend.put(b'0' * 2**21, f'{disk}/iter_1.pth')
        assert (disk / 'iter_1.pth').read_bytes() == b'good'
        assert [path.name for path in disk.iterdir()] == ['iter_1.pth']
    finally:
        subprocess.run(['umount', disk], check=True)


def save(path, age, **more):
    torch.save(
        dict(meta=dict(iter=age), state_dict={}, optimizer={}, message_hub={}, **more), path
    )
    os.utime(path, ns=(age, age))


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert find_checkpoint(tmp_path) is None
    for age in (1, 2, 3):
        save(tmp_path / f'iter_{age}.pth', age)
    assert find_checkpoint(tmp_path)[1] == dict(iter=3)
    damaged = tmp_path / 'iter_3.pth'
    damaged.write_bytes(damaged.read_bytes()[:-9])
    torch.save({'w': torch.ones(1)}, tmp_path / 'best.pth')  # the newest of files
    (tmp_path / 'shards.pth').mkdir()
    (tmp_path / 'last_checkpoint').touch()
    assert find_checkpoint(tmp_path) == (str(tmp_path / 'iter_2.pth'), dict(iter=2))
    for name in ('iter_1.pth', 'iter_2.pth'):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r'has 3 checkpoints, and none can be continued'):
        find_checkpoint(tmp_path)


def test_the_last_checkpoint_may_lie_elsewhere(tmp_path):
    (tmp_path / 'run').mkdir()
    save(tmp_path / 'iter_1.pth', 1)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
    assert find_checkpoint(tmp_path / 'run') == (str(tmp_path / 'iter_1.pth'), dict(iter=1))


def test_resuming_from_weights_alone_is_refused(published_file):
    with pytest.raises(CheckpointError, match=r'has no meta and no optimizer.*load_from=FILE'):
        resume(Config(), str(published_file))


def test_resuming_another_model_is_refused(nuclei, tmp_path):
    """MMEngine would go on with a random head, up to the optimizer's error."""
    cfg = segmentor(nuclei, tmp_path)
    workers(cfg, 0)
    cfg.train_cfg.max_iters = 2
    train(cfg)
    cfg.train_cfg.max_iters = 4
    cfg.model.decode_head.num_classes = 3
    with pytest.raises(
        CheckpointError,
        match=r'^--resume: \S+iter_2.pth cannot be loaded into the EncoderDecoder of the config: '
        r'2 tensors differ in shape .*\. The file holds a segmentor .*load_from=FILE',
    ):
        train(cfg, resume(cfg, 'auto'))
