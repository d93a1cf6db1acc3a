"""What a toolbox's own tools print, ours print too, to the last digit."""

import importlib
import json
from pathlib import Path

import pytest

from trainings import STEPS, classifier, detector, segmentor

METRICS = dict(mmdet='coco/segm_mAP', mmseg='mIoU', mmpretrain='accuracy/top1')
BUILD = dict(mmdet=detector, mmseg=segmentor, mmpretrain=classifier)
TIMES = ('time', 'data_time', 'memory')


def scalars(folder):
    """What MMEngine logged of each step, or of a test, without what a clock says."""
    [path] = Path(folder).glob('*/vis_data/scalars.json')
    records = map(json.loads, path.read_text().splitlines())
    return [{key: v for key, v in r.items() if key not in TIMES} for r in records]


def metrics(folder):
    [path] = Path(folder).glob('*/*.json')
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES}


@pytest.mark.parametrize('toolbox', BUILD)
def test_trains_and_tests_as_the_toolbox_does(toolbox, nuclei, run, tmp_path):
    """With augmentation, dropped paths and, in classification, mixed images."""
    data = tmp_path if toolbox == 'mmpretrain' else nuclei
    BUILD[toolbox](data, tmp_path / 'work').dump(tmp_path / 'config.py')
    own = Path(importlib.import_module(toolbox).__file__).parent / '.mim/tools'
    for name, tools in (('own', own), ('ours', 'tools')):
        train, test = tmp_path / name / 'train', tmp_path / name / 'test'
        run('python', f'{tools}/train.py', tmp_path / 'config.py', '--work-dir', train)
        checkpoint = (train / 'last_checkpoint').read_text()
        run('python', f'{tools}/test.py', tmp_path / 'config.py', checkpoint, '--work-dir', test)
    own, ours = (scalars(tmp_path / name / 'train') for name in ('own', 'ours'))
    losses = [record['loss'] for record in ours if 'loss' in record]
    assert len(losses) == STEPS
    assert len(set(losses)) == STEPS
    assert ours == own
    tested = [metrics(tmp_path / name / 'test') for name in ('own', 'ours')]
    assert METRICS[toolbox] in tested[0]
    assert tested[0] == tested[1]
    difference = max(abs(a[key] - b[key]) for a, b in zip(own, ours) for key in a if 'loss' in key)
    print(
        f'{toolbox}: {len(losses)} steps, losses {losses[0]:.4f} to {losses[-1]:.4f}, largest '
        f'difference {difference}; {METRICS[toolbox]} {tested[0][METRICS[toolbox]]} by both'
    )
