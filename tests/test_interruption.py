"""A training that is killed goes on from its last checkpoint, whenever it was killed."""

import os
import random
import signal
import time
from pathlib import Path

import mmdet
import pytest
import torch

from conftest import ROOT
from trainings import detector

TOOLS = (ROOT / 'tools/train.py', Path(mmdet.__file__).parent / '.mim/tools/train.py')


def last_step(folder):
    """The step of the last checkpoint; it can be read, whatever came after it."""
    path = folder / 'last_checkpoint'
    if not path.exists():
        return 0
    return torch.load(path.read_text(), weights_only=False)['meta']['iter']


def wait_for_saving(folder, known):
    """Until a checkpoint is being written, and not yet the last."""
    while not set(folder.glob('*.pth')) - known:
        time.sleep(0.0005)


def train_through(kills, nuclei, folder, popen):
    """Kill a training again and again, then let it end; what each start said of its place."""
    cfg = detector(nuclei, folder / 'work')
    cfg.train_cfg.update(max_epochs=10_000, val_interval=10_000)
    # A file that takes long to write: kills hit it.
    cfg.model.roi_head.bbox_head.fc_out_channels = 1024
    cfg.dump(folder / 'config.py')
    (folder / 'work').mkdir()
    generator = random.Random(0)
    for i in range(kills + 1):
        step, known = last_step(folder / 'work'), set((folder / 'work').glob('*.pth'))
        tool = TOOLS[i % 2]
        if i == kills:
            cfg.train_cfg.max_epochs = step // 2 + 1
            cfg.dump(folder / 'config.py')
        log = folder / 'log.txt'
        log.write_text('')
        process, _ = popen('python', tool, folder / 'config.py', '--resume', OMP_NUM_THREADS='1')
        if i == kills:
            assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        else:
            if i % 2 == 0:
                wait_for_saving(folder / 'work', known)
            else:
                while last_step(folder / 'work') == step:
                    time.sleep(0.05)
                time.sleep(2 * generator.random())
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if step:
            assert f', iter: {step}' in log.read_text(), log.read_text()[-3000:]
    return cfg.train_cfg.max_epochs


@pytest.mark.soak
def test_ten_kills(nuclei, tmp_path, popen):
    epochs = train_through(10, nuclei, tmp_path, popen)
    print(f'kills survived: 10, five of them while saving; trained to the end of epoch {epochs}')
