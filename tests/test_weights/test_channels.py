"""Weights for other numbers of image channels."""

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from conftest import small
from lska_mm.weights.names import convert_state_dict
from lska_mm.weights.resize import resize_channels

KEY = 'backbone.patch_embed1.proj.weight'


@pytest.mark.parametrize('in_channels', [1, 2, 3, 4, 5, 6, 9, 13])
def test_as_timm_does(in_channels):
    state = small().state_dict()
    expected = adapt_input_conv(in_channels, state['patch_embed1.proj.weight'])
    resized = resize_channels(state, in_channels)
    torch.testing.assert_close(resized.pop(KEY), expected, rtol=1e-6, atol=1e-7)
    for key, value in resized.items():
        assert value is convert_state_dict(state)[key]


def test_the_demo_with_four_bands_trains(run, published_file, tmp_path):
    run('python', 'tools/dataset_converters/nuclei.py', '--out', tmp_path, '--formats', 'bands')
    data = [f'{split}_dataloader.dataset.data_root={tmp_path}/bands' for split in ('train', 'val')]
    printed = run(
        'python', 'tools/train.py', 'demo/lska-van-tiny_fpn_nuclei-4bands.py', '--work-dir',
        tmp_path / 'work', '--cfg-options', *data, 'train_cfg.max_iters=1',
        'train_cfg.val_interval=1', f'model.backbone.init_cfg.checkpoint={published_file}',
    )  # fmt: skip
    assert 'in_channels=3 to 23, 4: ' in printed
    assert 'mIoU: ' in printed
