"""Weights of another kernel size or number of channels, by a line in a config."""

import re
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT, SMALL, largest_difference, reference_error, reference_image, trained
from lska_mm import LSKA, LSKAVAN
from lska_mm.weights.names import CheckpointError


def resized_backbone(path, **kwargs):
    nearest = kwargs.pop('nearest', False)
    init_cfg = dict(type='ResizedPretrained', checkpoint=str(path), nearest=nearest)
    backbone = LSKAVAN(**{**dict(arch=SMALL, kernel_size=53, out_indices=(0, 1)), **kwargs},
                       init_cfg=init_cfg)  # fmt: skip
    backbone.init_weights()
    return backbone.eval()


@pytest.fixture
def small_file(tmp_path):
    backbone = trained(kernel_size=23)
    torch.save(dict(state_dict=backbone.state_dict()), tmp_path / 'k23.pth')
    return tmp_path / 'k23.pth', backbone


def test_initialiser(small_file):
    path, backbone = small_file
    assert largest_difference(backbone, resized_backbone(path), [(61, 83)]) <= 1e-12
    first = resized_backbone(path, out_indices=(0,))
    assert largest_difference(backbone, first, [(61, 83)]) <= 1e-12


def test_initialiser_in_a_detector(published_file):
    """Nothing that is initialised later overwrites it."""
    cfg = Config.fromfile(ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py')
    cfg.model.backbone.kernel_size = 35
    cfg.model.backbone.init_cfg = dict(type='ResizedPretrained', checkpoint=str(published_file))
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    with torch.no_grad():
        assert reference_error(detector.backbone.eval()(reference_image())) <= 1e-5


def test_initialiser_takes_another_number_of_channels(small_file):
    """Grey: what three equal channels gave. Other kernels at the same time."""
    path, backbone = small_file
    grey = resized_backbone(path, in_channels=1)
    image = torch.rand(2, 1, 61, 83)
    with torch.no_grad():
        for out, expected in zip(grey(image), backbone(image.expand(-1, 3, -1, -1))):
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_initialiser_says_what_it_did(small_file, monkeypatch, capsys):
    path, _ = small_file
    for handler in MMLogger.get_current_instance().handlers:
        monkeypatch.setattr(handler, 'stream', sys.stdout, raising=False)
    resized_backbone(path)
    resized_backbone(path, kernel_size=11, nearest=True)
    printed = capsys.readouterr().out
    resized = f'{path}: resized from kernel_size=23, in_channels=3 to '
    assert f'{resized}53, 3: the same function' in printed
    assert re.search(rf'{resized}11, 3: not the same function: dense kernels differ by up to '
                     r'0\.\d+ of their norm, 0\.\d+ on average', printed)  # fmt: skip


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(kernel_size=11), r'k23.pth: block1.*kernel size 11 has no place.*nearest=True'),
        (dict(arch=dict(SMALL, depths=[1, 1])), r"depths': \[2, 1\].*depths': \[1, 1\].*Nothing"),
        (dict(attention='LKA'), "attention='LSKA'.*attention='LKA'.*Nothing was loaded"),
        (dict(norm_cfg=dict(type='GN', num_groups=2)), 'tensors are unexpected'),
    ],
)
def test_initialiser_refuses(small_file, kwargs, match):
    with pytest.raises(CheckpointError, match=match):
        resized_backbone(small_file[0], **kwargs)


def test_initialiser_says_what_is_in_a_file_of_something_else(tmp_path):
    torch.save({'conv1.weight': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other.pth holds no LSKA-VAN \(1 tensors'):
        resized_backbone(tmp_path / 'other.pth')


def test_initialiser_is_for_the_backbone_only(small_file):
    gate = LSKA(8, 53, init_cfg=dict(type='ResizedPretrained', checkpoint=str(small_file[0])))
    with pytest.raises(TypeError, match='for the init_cfg of an LSKAVAN backbone, not of LSKA'):
        gate.init_weights()
