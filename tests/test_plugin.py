"""LSKA in other backbones and necks, as docs/plugin.md describes it."""

import re

import pytest
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT
from trainings import DATA, build_model, train_one_step

RETINANET = ROOT / 'configs/detection/retinanet_r50-lska_fpn_1x_coco.py'
WIDTHS = [32, 64, 128, 256]
RESNET = dict(
    type='ResNet',
    depth=50,
    stem_channels=8,
    base_channels=8,
    zero_init_residual=False,  # or a gate after conv3 has no gradient in the first step
    plugins=[
        dict(
            cfg=dict(type='LSKA', kernel_size=11),
            stages=(False, True, True, True),
            position='after_conv3',
        )
    ],
)


def necks(num_outs, **fpn):
    fpn = dict(type='FPN', in_channels=WIDTHS, out_channels=16, num_outs=num_outs, **fpn)
    return [fpn, dict(type='LSKANeck', in_channels=16, num_outs=num_outs, kernel_size=11)]


# A config of each toolbox, what is changed in it, and how many maps its LSKANeck gets.
CLASSIFIER = 'classification/lska-van-tiny_4xb128_in1k'
MODELS_WITH_GATES = dict(
    mmdet=(
        'detection/retinanet_lska-van-tiny_fpn_1x_coco',
        dict(
            backbone=RESNET,
            neck=necks(5, start_level=1, add_extra_convs='on_input'),
            bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1),
        ),
        5,
    ),
    mmseg=(
        'segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512',
        dict(backbone=RESNET, neck=necks(4), decode_head=dict(in_channels=[16] * 4)),
        4,
    ),
    # mmpretrain's ResNet has no plugins.
    mmpretrain_mmdet=(
        CLASSIFIER, dict(backbone=dict(RESNET, type='mmdet.ResNet', out_indices=(3,))), 0
    ),
    mmpretrain_mmseg=(
        CLASSIFIER, dict(backbone=dict(RESNET, type='mmseg.ResNet', out_indices=(3,))), 0
    ),
)  # fmt: skip


@pytest.mark.parametrize('case', MODELS_WITH_GATES)
def test_trains(case):
    """Adam without decay changes a weight if it has a gradient, however small."""
    name, changes, maps = MODELS_WITH_GATES[case]
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.model.pop('backbone')
    cfg.merge_from_dict(dict(model=changes))
    cfg.optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3, eps=1e-20))
    before = dict(build_model(cfg).named_parameters())
    after = dict(train_one_step(cfg, DATA[cfg.default_scope]).named_parameters())
    gates = [name for name in after if re.match(r'backbone\.layer[234]\.\d\.lska\.', name)]
    blocks = [name for name in after if name.startswith('neck.1.')]
    # Weight and bias of five convolutions in 4 + 6 + 3 gates, of seven in a neck's block.
    assert (len(gates), len(blocks)) == (10 * 13, 14 * maps)
    assert not [name for name in gates + blocks if torch.equal(after[name], before[name])]


def test_torchvision_weights_load_and_the_gates_start_open(tmp_path):
    """The worked config starts from exactly what torchvision computes."""
    torch.manual_seed(0)
    source = torchvision.models.resnet50().eval()
    torch.save(source.state_dict(), tmp_path / 'resnet50.pth')
    init_default_scope('mmdet')
    cfg = Config.fromfile(RETINANET).model.backbone
    cfg.init_cfg.checkpoint = str(tmp_path / 'resnet50.pth')
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    backbone.eval()
    missing, unexpected = backbone.load_state_dict(source.state_dict(), strict=False)
    assert unexpected == ['fc.weight', 'fc.bias']
    assert len(missing) == 10 * (4 + 6 + 3)
    assert all('.lska.' in name for name in missing)
    x = torch.rand(1, 3, 64, 64)
    expected = x
    with torch.no_grad():
        for module in list(source.children())[:-2]:  # no pooling, no head
            expected = module(expected)
        torch.testing.assert_close(backbone(x)[-1], expected, rtol=1e-4, atol=1e-4)
        backbone.layer4[2].lska.conv1.bias.fill_(2)
        assert not torch.allclose(backbone(x)[-1], expected, rtol=1e-2)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        (dict(kernel_size=24), ValueError, '23 and 29'),
        (dict(in_channels=64), TypeError, "multiple values for keyword argument 'in_channels'"),
    ],
)
def test_errors_of_a_plugin(changes, error, message):
    init_default_scope('mmdet')
    plugin = dict(cfg=dict(type='LSKA', **changes), position='after_conv3')
    with pytest.raises(error, match=message):
        MODELS.build(dict(RESNET, plugins=[plugin]))


def test_only_bottlenecks_take_plugins():
    """mmdet's and mmseg's ResNet-18 and -34 refuse them."""
    for toolbox in ('mmdet', 'mmseg'):
        init_default_scope(toolbox)
        with pytest.raises(AssertionError, match='Not implemented yet'):
            MODELS.build(dict(RESNET, depth=18))
