"""OpenMMLab's `mim` finds the models, trains and tests them."""

from importlib.util import find_spec

import pytest

CONFIG = 'demo/lska-van-tiny_digits.py'


@pytest.mark.soak  # MMEngine's and mim's own code; test_package.py has what they find
# not imported: it makes its folder, and fails where another process was faster
@pytest.mark.skipif(not find_spec('mim'), reason='onedl-mim goes with the default stack')
def test_mim_searches_trains_and_tests(run, digits, tmp_path):
    printed = run('mim', 'search', 'lska_mm', '--field', 'config', cwd=tmp_path)
    assert 'configs/detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py' in printed
    options = [
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in (f'dataset.data_root={digits}', 'dataset.indices=16', 'num_workers=0',
                    'persistent_workers=False')
    ]  # fmt: skip
    options += ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=8']
    how = ['--gpus', '0', '--launcher', 'none', '--work-dir', tmp_path, '--cfg-options', *options]
    assert 'Epoch(val) [1][1/1]' in run('mim', 'train', 'lska_mm', CONFIG, *how)
    checkpoint = tmp_path / 'epoch_1.pth'
    printed = run('mim', 'test', 'lska_mm', CONFIG, '--checkpoint', checkpoint, *how)
    assert 'accuracy/top1' in printed
