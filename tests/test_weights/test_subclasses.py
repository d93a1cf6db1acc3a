"""Weights of backbones that have more in them than LSKAVAN."""

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from conftest import SMALL, published_state
from lska_mm import LSKAVAN
from lska_mm.weights.names import CheckpointError, convert_state_dict

PUBLISHED = published_state()


class Adapted(LSKAVAN):
    def __init__(self, arch=SMALL, kernel_size=11, name='adapter', **kwargs):
        super().__init__(arch, kernel_size, **kwargs)
        self.add_module(name, nn.Conv2d(8, 8, 1))
        self.scale = nn.Parameter(torch.rand(3))


def bare(backbone):
    return backbone


def in_a_model(backbone):
    return nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ('name', 'saved', 'loaded'),
    [
        ('adapter', bare, bare),
        ('adapter', in_a_model, in_a_model),
        ('adapter', in_a_model, bare),
        ('norm', bare, bare),
        ('head', in_a_model, in_a_model),  # at the top of a file it is a classifier's
    ],
)
def test_a_subclass_loads_what_it_saved(name, saved, loaded, tmp_path):
    old, new = (Adapted(out_indices=(0, 1), name=name) for _ in range(2))
    path = str(tmp_path / 'adapted.pth')
    torch.save(dict(state_dict=saved(old).state_dict()), path)
    load_checkpoint(loaded(new), path)
    state = old.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in new.state_dict().items())


def test_a_subclass_starts_from_published_weights(published_file):
    init_cfg = dict(type='Pretrained', checkpoint=str(published_file))
    backbone = Adapted('tiny', 23, init_cfg=init_cfg)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    published = convert_state_dict(PUBLISHED)
    for key, value in backbone.state_dict().items():
        own = key.startswith(('adapter', 'scale'))
        assert torch.equal(value, before[key] if own else published[f'backbone.{key}'])


class AdaptedInside(LSKAVAN):
    """With modules inside its blocks and behind its stages' parts."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for blocks in (self.block1, self.block2):
            for block in blocks:
                block.mlp.adapter = nn.Conv2d(block.mlp.fc1.in_channels, 4, 1)
                block.prompt = nn.Parameter(torch.rand(4))
        self.patch_embed1.adapter = nn.Linear(2, 2)


@pytest.mark.parametrize('way', ['init_weights', 'load_checkpoint', 'detector'])
def test_a_subclass_with_modules_in_its_blocks_takes_a_whole_van(way, published_file):
    """What it brings along stays as it was initialized; a part of a VAN is refused, as ever."""
    state = {k: v for k, v in PUBLISHED.items() if 'head' not in k}

    def load(path):
        init_cfg = dict(type='Pretrained', checkpoint=str(path))
        backbone = AdaptedInside(init_cfg=init_cfg if way == 'init_weights' else None)
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        if way == 'init_weights':
            backbone.init_weights()
        else:
            model = nn.ModuleDict(dict(backbone=backbone)) if way == 'detector' else backbone
            load_checkpoint(model, str(path))
        return before, backbone.state_dict()

    before, after = load(published_file)
    whole = {key[9:]: value for key, value in convert_state_dict(state).items()}
    for key, value in after.items():
        own = 'adapter' in key or 'prompt' in key
        assert torch.equal(value, before[key] if own else whole[key]), key
    del state['block1.0.mlp.fc1.weight']
    torch.save(state, published_file.with_name('part.pth'))
    with pytest.raises(CheckpointError, match=r'block1\.0\.mlp\.fc1\.weight'):
        load(published_file.with_name('part.pth'))


def test_a_subclass_needs_its_tensors_in_strict_loading():
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale", "adapter.weight"'):
        Adapted('tiny', 23).load_state_dict(PUBLISHED)
