"""Training for long: memory, open files and workers."""

import csv
import os
import re

import pytest

from conftest import load_tool
from trainings import segmentor

growth = load_tool('.dev_scripts/soak.py').growth


def soak(run, config, folder, minutes, *arguments):
    return run(
        'python', '.dev_scripts/soak.py', config, '--minutes', minutes, '--out',
        folder, *arguments, OMP_NUM_THREADS='1',
    )  # fmt: skip


@pytest.mark.soak
def test_a_short_soak(run, nuclei, tmp_path):
    """Too short for a judgement on memory, but not on what is left over."""
    cfg = segmentor(nuclei, tmp_path)
    cfg.default_hooks.checkpoint.interval = 4
    cfg.dump(tmp_path / 'config.py')
    short = ['--runners', 2, '--interval', 0.5, '--limit', 200]
    printed = soak(run, tmp_path / 'config.py', tmp_path / 'out', 0.2, *short)
    assert 'soak: 0 zombies, 0 workers that outlived their Runner' in printed
    assert (tmp_path / 'out/soak.png').stat().st_size > 10_000
    with (tmp_path / 'out/soak.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert {row['runner'] for row in rows} == {'1', '2'}
    assert max(int(row['workers']) for row in rows) == 2
    # The second Runner goes on from a checkpoint.
    assert min(int(row['iter']) for row in rows if row['runner'] == '2') > 1


def test_growth_is_seen():
    samples = [dict(seconds=i, main_mib=100 + (i if i > 10 else 20)) for i in range(101)]
    assert growth(samples, 'main_mib', 0.2) == (129.5, 61)


@pytest.mark.soak
def test_an_hour(run, tmp_path):
    """SOAK_MINUTES=N for another time."""
    run('python', 'tools/dataset_converters/nuclei.py', '--out', 'data/nuclei')
    printed = soak(
        run, 'demo/lska-van-tiny_fpn_nuclei.py', tmp_path / 'out',
        os.environ.get('SOAK_MINUTES', '60'), '--cfg-options', 'train_cfg.val_interval=20',
        'default_hooks.checkpoint.interval=50',
    )  # fmt: skip
    print('\n'.join(re.findall(r'^soak: .*', printed, re.MULTILINE)))
