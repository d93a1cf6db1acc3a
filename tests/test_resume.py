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
from mmengine.registry import HOOKS

from conftest import ROOT
from lska_mm.checkpoint import CheckpointError
from lska_mm.launch import resume
from lska_mm.resume import find_checkpoint, read_meta
from lska_mm.signals import EXIT_CODE, worker_context
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
    ours, theirs = (
        {'optimizer': dict(state={}), **torch.load(path, weights_only=False)}  # best_*.pth: none
        for path in (ours, theirs)
    )
    assert ours['meta']['iter'] == theirs['meta']['iter']
    for one, other in zip(
        [*ours['state_dict'].values(), *flat(ours['optimizer']['state'])],
        [*theirs['state_dict'].values(), *flat(theirs['optimizer']['state'])],
        strict=True,
    ):
        assert torch.equal(one, other)


def flat(state):
    return [value for entry in state.values() for value in entry.values()]


class InterruptValidation(Hook):
    """SIGTERM amid the validation after a step."""

    def __init__(self, step):
        self.step = step

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


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


def continued(build, data, tmp_path, hook, change):
    """A training at a stretch and one that is interrupted, each in a folder of its name."""
    whole, parts = build(data, tmp_path / 'whole'), build(data, tmp_path / 'parts')
    for cfg in (whole, parts):
        workers(cfg, 0)
        change(cfg)
    train(whole)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(parts, hook=hook)
    step = read_meta(tmp_path / 'parts/interrupted.pth')['iter']
    train(parts, resume(parts, 'auto'))
    signal.signal(signal.SIGTERM, handler)
    assert_same(*(tmp_path / run / f'iter_{STEPS}.pth' for run in ('whole', 'parts')))
    return step


@pytest.mark.parametrize('hook', [Interrupt(3), InterruptValidation(3)], ids=['before', 'amid'])
def test_an_interrupted_validation_is_made_up_for(hook, nuclei, tmp_path):
    """That after step 3, whose mIoU is made the best."""

    class Best(Hook):
        priority = 'HIGH'

        def after_val_epoch(self, runner, metrics=None):
            metrics['score'] = -runner.iter

    def keep_best(cfg):
        HOOKS.register_module(module=Best, name='Best', force=True)
        cfg.custom_hooks = [dict(type='Best')]
        cfg.default_hooks.checkpoint.update(save_best='score', rule='greater')

    assert continued(segmentor, nuclei, tmp_path, hook, keep_best) == 3
    assert (tmp_path / 'whole/best_score_iter_3.pth').exists()
    assert_same(*(tmp_path / run / 'best_score_iter_3.pth' for run in ('whole', 'parts')))


def test_the_last_validation_is_made_up_for(tmp_path, capfd):
    def validate_once(cfg):
        cfg.train_cfg.val_interval = 2

    hook = InterruptValidation(STEPS)
    assert continued(classifier, tmp_path, tmp_path, hook, validate_once) == STEPS
    assert capfd.readouterr().out.count('accuracy/top1:') == 2


def test_sigterm_waits_for_accumulated_gradients(nuclei, tmp_path):
    def accumulate(cfg):
        cfg.optim_wrapper.accumulative_counts = 2
        cfg.default_hooks.checkpoint.interval = 4

    step = continued(segmentor, nuclei, tmp_path, InterruptValidation(3), accumulate)
    assert step == 4


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
    meta = dict(iter=age, epoch=0)
    parts = dict(meta=meta, state_dict={}, optimizer={}, message_hub={})
    torch.save({**parts, **more}, path)
    os.utime(path, ns=(age, age))


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert find_checkpoint(tmp_path) is None
    for age in (1, 2, 3):
        save(tmp_path / f'iter_{age}.pth', age)
    assert find_checkpoint(tmp_path)[1] == dict(iter=3, epoch=0)
    damaged = tmp_path / 'iter_3.pth'
    damaged.write_bytes(damaged.read_bytes()[:-9])
    torch.save({'w': torch.ones(1)}, tmp_path / 'best.pth')  # the newest of files
    (tmp_path / 'shards.pth').mkdir()
    (tmp_path / 'last_checkpoint').touch()
    assert find_checkpoint(tmp_path) == (str(tmp_path / 'iter_2.pth'), dict(iter=2, epoch=0))
    for name in ('iter_1.pth', 'iter_2.pth'):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r'has 3 checkpoints, and none can be continued'):
        find_checkpoint(tmp_path)


def test_the_last_checkpoint_may_lie_elsewhere(tmp_path):
    (tmp_path / 'run').mkdir()
    save(tmp_path / 'iter_1.pth', 1)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
    assert find_checkpoint(tmp_path / 'run') == (
        str(tmp_path / 'iter_1.pth'),
        dict(iter=1, epoch=0),
    )


def test_a_copied_folder_goes_on_from_its_own(tmp_path):
    for folder, age in (('original', 2), ('copy', 1)):
        (tmp_path / folder).mkdir()
        save(tmp_path / f'{folder}/iter_{age}.pth', age)
        (tmp_path / f'{folder}/last_checkpoint').write_text(f'{tmp_path}/original/iter_2.pth')
    assert find_checkpoint(tmp_path / 'copy')[0] == f'{tmp_path}/copy/iter_1.pth'


def test_resuming_from_weights_alone_is_refused(published_file):
    with pytest.raises(CheckpointError, match=r'has no meta and no optimizer.*load_from=FILE'):
        resume(Config(), str(published_file))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(meta=None), 'has no meta: training can start'),
        (dict(meta={}), 'says iter=None in meta, which is no number'),
        (dict(meta=dict(iter='8', epoch=1)), "says iter='8'"),
        (dict(meta=dict(iter=8, epoch=1, seed=-1)), 'says seed=-1'),
        (dict(state_dict=[], optimizer=3), 'has no state_dict and no optimizer'),
    ],
)
def test_what_no_training_wrote_is_refused(change, message, tmp_path):
    save(tmp_path / 'iter_8.pth', 8, **change)
    with pytest.raises(CheckpointError, match=rf'iter_8\.pth {message}'):
        read_meta(tmp_path / 'iter_8.pth')


CHANGES = {
    'classes': (
        dict(model=dict(decode_head=dict(num_classes=3))),
        r'\S+iter_2.pth cannot be loaded into the EncoderDecoder of the config: 2 tensors differ '
        r'in shape .*\. The file holds a segmentor ',
    ),
    'optimizer': (
        dict(optim_wrapper=dict(optimizer=dict(_delete_=True, type='SGD', lr=1.0))),
        'another optimizer than the config: one without dampening, momentum',
    ),
    'groups': (
        dict(optim_wrapper=dict(paramwise_cfg=dict(bias_decay_mult=0.0))),
        r'optimizes \d+ parameters in 1 groups, the config \d+ in \d\d+',
    ),
    'averaging': (dict(custom_hooks=[]), 'averages weights, and the config has no EMAHook'),
}


@pytest.fixture(scope='module')
def averaged(nuclei, tmp_path_factory):
    """Two steps of a training with EMA."""
    cfg = segmentor(nuclei, tmp_path_factory.mktemp('averaged'))
    workers(cfg, 0)
    cfg.train_cfg.max_iters = 2
    cfg.optim_wrapper.pop('paramwise_cfg', None)
    cfg.custom_hooks = [dict(type='EMAHook')]
    train(cfg)
    cfg.train_cfg.max_iters = 4
    return cfg


@pytest.mark.parametrize('change', CHANGES)
def test_resuming_another_training_is_refused(change, averaged):
    """MMEngine goes on with random heads and other weights, or ends in an error of PyTorch."""
    options, message = CHANGES[change]
    cfg = Config(Config._merge_a_into_b(options, averaged.to_dict()))
    with pytest.raises(CheckpointError, match=f'^--resume: .*{message}.*load_from=FILE'):
        train(cfg, resume(cfg, 'auto'))


def test_an_optimizer_of_other_numbers_is_refused(averaged, tmp_path):
    content = torch.load(f'{averaged.work_dir}/iter_2.pth', weights_only=False)
    for state, message in (
        (dict(param_groups=3), 'left no state of an optimizer'),
        ({**content['optimizer'], 'state': {0: {'exp_avg': torch.ones(1) / 0}}}, 'left NaN or '),
    ):
        torch.save({**content, 'optimizer': state}, tmp_path / 'changed.pth')
        cfg = averaged.copy()
        with pytest.raises(CheckpointError, match=f'changed.pth {message}'):
            train(cfg, resume(cfg, str(tmp_path / 'changed.pth')))
