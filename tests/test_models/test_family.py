"""The family's names and sizes: the paper's, mmpretrain's, and those of VAN's authors."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from lska_mm import LSKAVAN
from lska_mm.models.archs import ARCHS
from lska_mm.weights.match import describe

NAMES = ['tiny t b0', 'small s b1', 'base b b2', 'large l b3']
# Widths, depths and ratios of VAN's authors.
LARGER = dict(
    b4=([64, 128, 320, 512], [3, 6, 40, 3], [8, 8, 4, 4]),
    b5=([96, 192, 480, 768], [3, 3, 24, 3], [8, 8, 4, 4]),
    b6=([96, 192, 384, 768], [6, 6, 90, 6], [8, 8, 4, 4]),
)


@pytest.mark.parametrize('names', NAMES)
def test_each_size_has_three_names(names):
    one, *others = (ARCHS[name] for name in names.split())
    assert others == [one, one]


@pytest.mark.parametrize('name', LARGER)
def test_the_larger_sizes_of_van(name):
    with torch.device('meta'):
        backbone = LSKAVAN(name, 23, 'LKA')
    settings = dict(zip(('embed_dims', 'depths', 'ffn_ratios'), LARGER[name]))
    assert backbone.arch_settings == settings
    assert describe(backbone.state_dict())['arch'] == settings


def test_mmpretrain_has_the_same_sizes():
    from mmpretrain.models import VAN

    for name in 'tsbl':
        own = VAN(name).arch_settings
        assert {key: list(value) for key, value in own.items()} == ARCHS[name]


def test_patch_sizes():
    backbone = MODELS.build(dict(type='LSKAVAN', arch='t', patch_sizes=[7, 5, 5, 5]))
    sides = [getattr(backbone, f'patch_embed{i}').proj.kernel_size for i in range(1, 5)]
    assert sides == [(7, 7), (5, 5), (5, 5), (5, 5)]
    for size in ((224, 224), (256, 309)):
        (out,) = backbone(torch.rand(1, 3, *size))
        assert out.shape == (1, 256, math.ceil(size[0] / 32), math.ceil(size[1] / 32))
    assert describe(backbone.state_dict())['patch_sizes'] == [7, 5, 5, 5]
    assert 'patch_sizes' not in describe(LSKAVAN().state_dict())


def test_layer_norm_in_blocks_is_refused():
    """It would take the width of the maps for their channels."""
    with pytest.raises(ValueError, match='normalizes the last axis, which is the width'):
        LSKAVAN(norm_cfg=dict(type='LN'))
    LSKAVAN(norm_cfg=dict(type='mmpretrain.LN2d'))
