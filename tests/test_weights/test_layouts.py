"""Every published layout, by every way in."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from conftest import ROOT, published_state
from lska_mm import LSKAVAN
from lska_mm.weights.names import convert_state_dict

RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'


def copies_layout(state):
    """Names as in the paper's detection and segmentation folders."""
    renames = [
        ('block', 'blocks'),
        ('.proj.', '.projection.'),
        ('dwconv.dwconv', 'dwconv'),
        ('conv_spatial', 'DW_D_conv'),
        ('conv0', 'DW_conv_'),
    ]
    renamed = {}
    for key, value in state.items():
        if not key.startswith('head'):
            for old, new in renames:
                key = key.replace(old, new)
            renamed[key] = value
    return renamed


def trained_layout(state):
    """Names as in a classifier that was trained with this package."""
    renamed = {}
    for key, value in state.items():
        key = key.replace('dwconv.dwconv', 'dwconv')
        renamed[key.replace('head.', 'head.fc.') if 'head' in key else f'backbone.{key}'] = value
    return renamed


def mmpretrain_van():
    from mmpretrain.models import VAN

    torch.manual_seed(0)
    return {f'backbone.{key}': value for key, value in VAN('tiny').state_dict().items()}


PUBLISHED = published_state()
EMA = {key: value + 1 for key, value in PUBLISHED.items()}
FILES = {
    'published': dict(state_dict=PUBLISHED, state_dict_ema=EMA),
    'published, bare': PUBLISHED,
    'published, parallel': dict(state_dict={f'module.{k}': v for k, v in PUBLISHED.items()}),
    'copies': dict(state_dict=copies_layout(PUBLISHED)),
    'trained': dict(meta=dict(epoch=1), state_dict=trained_layout(PUBLISHED)),
    'mmpretrain VAN': dict(state_dict=mmpretrain_van()),
}
GATE = 'block1.0.attn.spatial_gating_unit.'


def attention_of(name):
    return 'LKA' if 'VAN' in name else 'LSKA'


def expected_backbone(name):
    """The tensors that a backbone must hold afterwards, found by position.

    All layouts list the tensors of a network in the order of its modules, so
    that no knowledge of names is used here.
    """
    state = FILES[name].get('state_dict', FILES[name])
    values = [value for key, value in state.items() if 'head' not in key]
    if 'VAN' in name:  # mmpretrain registers a block's layer scales elsewhere
        return None
    return values


def assert_loaded(backbone, name):
    state = backbone.state_dict()
    expected = expected_backbone(name)
    if expected is None:
        source = FILES[name]['state_dict']
        sums = [sorted(v.double().sum().item() for v in s.values()) for s in (state, source)]
        assert sums[0] == sums[1]
        assert torch.equal(
            state[f'{GATE}conv_spatial.weight'],
            source['backbone.blocks1.0.attn.spatial_gating_unit.DW_D_conv.weight'],
        )
        return
    assert len(state) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state.values(), expected))


def detector_config(name, **init_cfg):
    cfg = Config.fromfile(RETINANET)
    cfg.model.backbone.attention = attention_of(name)
    cfg.model.backbone.init_cfg = init_cfg and dict(type='Pretrained', **init_cfg)
    cfg.visualizer.vis_backends = []
    return cfg


def build_detector(cfg):
    init_default_scope('mmdet')
    return MODELS.build(cfg.model)


def pretrained_backbone(name, path):
    init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone = LSKAVAN('tiny', 23, attention_of(name), init_cfg=init_cfg)
    backbone.init_weights()
    return backbone


def load_state_dict(name, path):
    backbone, content = LSKAVAN('tiny', 23, attention_of(name)), torch.load(path)
    state = content.get('state_dict', content)
    keys = list(state)
    backbone.load_state_dict(state)
    assert list(state) == keys
    return backbone


def pretrained_in_a_detector(name, path, **prefix):
    detector = build_detector(detector_config(name, checkpoint=path, **prefix))
    detector.init_weights()
    return detector.backbone


def by_its_prefix(name, path):
    """That names have in the file, as for any backbone."""
    prefix = 'module.' if 'parallel' in name else 'backbone.'
    return pretrained_in_a_detector(name, path, prefix=prefix)


def load_from(name, path):
    detector = build_detector(detector_config(name))
    load_checkpoint(detector, path)  # what Runner does with load_from
    return detector.backbone


def by_init_detector(name, path):
    from mmdet.apis import init_detector

    return init_detector(detector_config(name), path, palette='random', device='cpu').backbone


@pytest.mark.parametrize('way', [
    pretrained_backbone, load_state_dict, pretrained_in_a_detector, by_its_prefix, load_from,
    by_init_detector,
])  # fmt: skip
@pytest.mark.parametrize('name', FILES)
def test_every_layout_by_every_way_in(name, way, tmp_path):
    torch.save(FILES[name], tmp_path / 'weights.pth')
    assert_loaded(way(name, str(tmp_path / 'weights.pth')), name)


def test_head_is_kept_for_a_classifier():
    init_default_scope('mmpretrain')
    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='LSKAVAN'),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=1000, in_channels=256),
        )
    )
    classifier.load_state_dict(convert_state_dict(PUBLISHED))
    assert torch.equal(classifier.head.fc.weight, PUBLISHED['head.weight'])


def test_first_stages_load_from_the_whole_network():
    backbone = LSKAVAN('tiny', out_indices=(1,))
    backbone.load_state_dict(PUBLISHED)
    assert torch.equal(backbone.norm2.weight, PUBLISHED['norm2.weight'])


@pytest.mark.parametrize('name', FILES)
def test_conversion_is_idempotent_and_loses_nothing(name):
    state = FILES[name].get('state_dict', FILES[name])
    once = convert_state_dict(state)
    assert convert_state_dict(once) == once
    assert [id(v) for v in once.values()] == [id(v) for v in state.values()]
    strangers = {'neck.conv.weight': 1, 'bbox_head.module.x': 2, 'layer1.0.bn1.weight': 3, '': 4}
    assert convert_state_dict(strangers) == strangers
