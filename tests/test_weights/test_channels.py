"""Weights for other numbers of image channels."""

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from conftest import small, trained
from lska_mm.weights.names import CheckpointError, convert_state_dict
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


@pytest.mark.parametrize(('found', 'in_channels'), [(3, 1), (3, 6), (3, 12), (1, 3), (1, 4)])
def test_equal_channels_give_the_same(found, in_channels):
    backbone, other = trained(in_channels=found).double(), small(in_channels=in_channels).eval()
    other.double().load_state_dict(resize_channels(backbone.state_dict(), in_channels))
    image = torch.rand(2, 1, 61, 83, dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(image.expand(-1, found, -1, -1))
        for out, wanted in zip(other(image.expand(-1, in_channels, -1, -1)), expected):
            torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


def test_refused():
    with pytest.raises(CheckpointError, match='for images of 4 channels; only those for 1 or 3'):
        resize_channels(small(in_channels=4).state_dict(), 3)
    with pytest.raises(ValueError, match='in_channels=0 is less than 1'):
        resize_channels(small().state_dict(), 0)


def test_the_demo_with_four_bands_trains(run, published_file, tmp_path):
    run('python', 'tools/dataset_converters/nuclei.py', '--out', tmp_path, '--formats', 'bands')
    data = [f'{split}_dataloader.dataset.data_root={tmp_path}/bands' for split in ('train', 'val')]
    printed = run(
        'python', 'tools/train.py', 'demo/lska-van-tiny_fpn_nuclei-4bands.py', '--work-dir',
        tmp_path / 'work', '--cfg-options', *data, 'train_cfg.max_iters=1',
        'train_cfg.val_interval=1', f'model.backbone.init_cfg.checkpoint={published_file}',
    )  # fmt: skip
    assert 'image channels 3, now 4' in printed
    assert 'mIoU: ' in printed
