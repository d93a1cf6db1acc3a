"""Hooks that a config names: labels, and signals."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mmseg
import psutil
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from conftest import ROOT
from lska_mm import CheckLabelsHook, SaveOnSignalHook
from lska_mm.engine.hooks import EXIT_CODE
from trainings import classifier, segmentor

# --- Labels ----------------------------------------------------------------------


def check(labels, batch=True, **head):
    """What the hook says of a label map."""
    head = SimpleNamespace(**{**dict(num_classes=3, out_channels=3, ignore_index=255), **head})
    runner = SimpleNamespace(model=SimpleNamespace(decode_head=head))
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.tensor([[labels]])))
    sample.set_metainfo(dict(seg_map_path='map.png'))
    for mode in ('train', 'val', 'test'):
        hook = getattr(CheckLabelsHook(), f'before_{mode}_iter')
        hook(runner, 0, dict(data_samples=[sample]) if batch else [sample])


@pytest.mark.parametrize(
    ('labels', 'head'),
    [
        ([0, 2, 255], {}),
        ([0, 1], dict(num_classes=2, out_channels=1)),  # one channel tells two classes apart
        ([0, 1], dict(num_classes=1, out_channels=1)),
        ([7], dict(ignore_index=7)),
    ],
)
def test_valid_labels(labels, head):
    check(labels, **head)


@pytest.mark.parametrize(
    ('labels', 'head', 'message'),
    [
        ([0, 3, 9], {}, r'map\.png has the labels \[3, 9\]; the model has 3 classes: valid l'),
        ([2], dict(num_classes=1, out_channels=1), r'\[2\]; the model has 2 classes'),
        ([255], dict(ignore_index=254), r'valid labels are 0 to 2, 254 for no class'),
    ],
)
def test_labels_beyond_the_classes(labels, head, message):
    with pytest.raises(ValueError, match=message):
        check(labels, **head)


def test_other_batches_and_models_pass():
    check([9], batch=False)
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1))
    CheckLabelsHook().before_train_iter(runner, 0, dict(data_samples=[]))


# --- Signals ---------------------------------------------------------------------


def write(cfg, folder):
    """A config with two workers that load the data."""
    cfg.custom_hooks = [dict(type='SaveOnSignalHook')]
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=2, persistent_workers=True)
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


def wait_for(folder, text):
    """Until the training has printed it."""
    end = time.monotonic() + 120
    while text not in (printed := (folder / 'log.txt').read_text()):
        assert time.monotonic() < end, printed[-3000:]
        time.sleep(0.05)
    return printed


@pytest.mark.parametrize(
    ('build', 'number', 'everyone', 'own'),
    [
        (segmentor, signal.SIGUSR1, True, True),  # by mmseg's own train.py
        pytest.param(segmentor, signal.SIGUSR1, True, False, marks=pytest.mark.soak),
        pytest.param(classifier, signal.SIGTERM, False, False, marks=pytest.mark.soak),
    ],
    ids=['usr1_to_all_by_own_tool', 'usr1_to_all', 'term'],
)
def test_a_signal_saves_and_resume_goes_on(
    build, number, everyone, own, nuclei, popen, run, tmp_path
):
    tool = Path(mmseg.__file__).parent / '.mim/tools/train.py' if own else ROOT / 'tools/train.py'
    cfg = build(tmp_path if build is classifier else nuclei, tmp_path / 'work')
    cfg.train_cfg.update({k: 10_000 for k in ('max_iters', 'max_epochs') if k in cfg.train_cfg})
    cfg.train_cfg.val_interval = 10_000
    cfg.default_hooks.checkpoint.interval = 10_000
    process, _ = popen('python', tool, write(cfg, tmp_path), OMP_NUM_THREADS='1')
    wait_for(tmp_path, 'lr: ')
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    for worker in workers if everyone else []:
        worker.send_signal(number)
    process.send_signal(number)
    assert process.wait(timeout=60) == EXIT_CODE
    saved = Path((tmp_path / 'work/last_checkpoint').read_text())
    step = torch.load(saved, weights_only=False)['meta']['iter']
    assert saved.name == f'iter_{step}.pth'
    printed = wait_for(tmp_path, 'Received a signal')
    assert f'Received a signal: saved {saved}; continue with --resume. Exit code 75' in printed

    cfg.train_cfg.update({k: 1 for k in ('max_iters', 'max_epochs') if k in cfg.train_cfg})
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.max_iters = step + 1
    printed = run('python', tool, write(cfg, tmp_path), '--resume', OMP_NUM_THREADS='1')
    assert f'resumed epoch: 0, iter: {step}' in printed or build is classifier
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    hook = SaveOnSignalHook()
    hook.before_train(None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert hook.asked
    hook.after_train(None)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_signals_need_the_main_thread():
    errors = []

    def listen():
        hook = SaveOnSignalHook()  # a Runner for a test may be built there
        try:
            hook.before_train(None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == [
        'SaveOnSignalHook needs the main thread, the only one that can receive signals: train '
        'there, or remove the hook from custom_hooks.'
    ]
