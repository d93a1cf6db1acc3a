"""The limit on paper, against counts by hand."""

import pytest
import torch
from torch import nn

from conftest import load_tool
from lska_mm import LSKAVAN

paper = load_tool('.dev_scripts/benchmarking/paper.py')
plain_lska_van = load_tool('.dev_scripts/benchmarking/plain_lska_van.py').plain_lska_van


def test_a_convolution_by_hand():
    """3 to 4 channels, 3 x 3, of 2 images of 5 x 7: maps, weights, biases in 16 bit."""
    conv = nn.Conv2d(3, 4, 3, padding=1)
    [found] = paper.operators(conv, torch.rand(2, 3, 5, 7, dtype=torch.bfloat16), train=False)
    assert found.name == 'convolution'
    assert found.bytes == 2 * (2 * 3 * 35 + 4 * 3 * 9 + 4 + 2 * 4 * 35)
    assert found.multiply_adds == 2 * 35 * 4 * 3 * 9


def test_views_cost_nothing_and_both_passes_count():
    chain = nn.Sequential(nn.Flatten(), nn.Linear(105, 4), nn.GELU())
    images = torch.rand(2, 3, 5, 7)
    names = [o.name for o in paper.operators(chain, images, train=False)]
    assert names == ['addmm', 'gelu']
    work = sum(o.multiply_adds for o in paper.operators(chain, images, train=True))
    assert work == 2 * 2 * 105 * 4  # forward, and the gradient of the weights


def test_the_longer_of_moving_and_multiplying():
    found = [paper.Operator('add', 3000, 0), paper.Operator('mm', 10, 5000)]
    assert paper.least_milliseconds(found, 1e6, 1e6) == pytest.approx(3 + 5)


@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_limits_of_a_gpu(arch):
    """32 images in 16 bit, 3 TB/s: kernels, GB moved, milliseconds; multiply-adds by formula."""
    images = torch.empty(32, 3, 224, 224, dtype=torch.bfloat16, device='meta')
    for train in (False, True):
        for name, model in (('plain', plain_lska_van(arch, 23)), ('default', LSKAVAN(arch))):
            if train and name == 'default' and torch.__version__.startswith('2.1.'):
                continue  # its checkpointing cannot be on the meta device
            found = paper.operators(model, images, train)
            moved = sum(o.bytes for o in found)
            least = paper.least_milliseconds(found, 3e12, 4e14)
            mode = 'training step' if train else 'inference'
            print(f'| {arch} | {name} | {mode} | {len(found)} | {moved / 1e9:.2f} | {least:.2f} |')
            work = sum(o.multiply_adds for o in found) / 32e9
            expected = dict(tiny=0.8326, base=4.9062)[arch]
            assert work == pytest.approx((3 if train else 1) * expected, rel=0.03)
            assert least >= 1e3 * moved / 3e12
