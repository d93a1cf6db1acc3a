"""Layer-wise learning-rate decay; groups counted by hand for tiny."""

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT

CONFIGS = dict(
    mmdet='configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py',
    mmseg='configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py',
    mmpretrain='configs/classification/lska-van-tiny_4xb128_in1k.py',
)
# Parameter of the backbone: its layer, of 15: stem, 3 + 3 + 5 + 2 blocks, the rest.
LAYERS = {
    'patch_embed1.proj.weight': 0,
    'block1.0.norm1.bias': 1,
    'block1.2.mlp.fc1.weight': 3,
    'norm1.weight': 3,
    'patch_embed2.proj.weight': 3,
    'block2.0.attn.proj_1.weight': 4,
    'block3.4.layer_scale_1': 11,
    'block4.1.mlp.fc2.bias': 13,
    'norm4.bias': 13,
}


def groups(scope, constructor='LayerDecayOptimWrapperConstructor', **paramwise_cfg):
    """Of each parameter of a config's model: its group."""
    cfg = Config.fromfile(ROOT / CONFIGS[scope])
    init_default_scope(scope)
    cfg.optim_wrapper.update(constructor=constructor, paramwise_cfg=paramwise_cfg)
    optimizer = build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper).optimizer
    return {group['param_name']: group for group in optimizer.param_groups}


def check_rates(found, base_lr):
    layers = {name: group['layer_id'] for name, group in found.items()}
    assert set(layers.values()) == set(range(15))
    for name, layer in LAYERS.items():
        assert layers[f'backbone.{name}'] == layer
    for name, layer in layers.items():
        assert name.startswith('backbone.') == (layer < 14)
        assert found[name]['lr'] == pytest.approx(base_lr * 0.5 ** (14 - layer))


@pytest.mark.parametrize(
    ('scope', 'base_lr'), [('mmdet', 1e-4), ('mmseg', 1e-4), ('mmpretrain', 1e-3)]
)
def test_rates_halve_from_layer_to_layer(scope, base_lr):
    check_rates(groups(scope, layer_decay_rate=0.5), base_lr)


def test_mmpretrain_constructor_gives_the_same_rates():
    found = groups('mmpretrain', 'LearningRateDecayOptimWrapperConstructor', layer_decay_rate=0.5)
    check_rates(found, 1e-3)


def test_other_settings_multiply():
    found = groups(
        'mmdet',
        layer_decay_rate=0.5,
        norm_decay_mult=0,
        custom_keys={'backbone.patch_embed1': dict(lr_mult=10)},
    )
    assert found['backbone.patch_embed1.proj.weight']['lr'] == pytest.approx(1e-3 * 0.5**14)
    assert found['backbone.block2.0.norm1.weight']['weight_decay'] == 0
    assert found['backbone.block2.0.attn.proj_1.weight']['weight_decay'] == 0.05


@pytest.mark.parametrize('rate', [None, 0, 1.5, 'high'])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match='above 0 and at most 1, got layer_decay_rate='):
        groups('mmpretrain', layer_decay_rate=rate)


def test_other_backbones_are_refused():
    cfg = Config.fromfile(ROOT / CONFIGS['mmpretrain'])
    init_default_scope('mmpretrain')
    cfg.model.backbone = dict(type='MobileNetV2')
    cfg.optim_wrapper.update(
        constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.5)
    )
    with pytest.raises(
        TypeError, match='get_layer_depth; ImageClassifier has a backbone of Mobile'
    ):
        build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper)
