"""Detectors of rotated boxes, which mmrotate builds."""

from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT
from trainings import build_model, train_one_step

CONFIGS = sorted((ROOT / 'configs/detection').glob('*_dota-le90.py'))


def rotated_data(cfg):
    """Two images with rotated boxes of DOTA's classes."""
    from mmrotate.testing import demo_mm_inputs

    return demo_mm_inputs(
        2, image_shapes=[(3, 96, 128), (3, 64, 96)], num_classes=15, use_box_type=True
    )


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_trains_a_step_and_predicts(path, tmp_path):
    assert len(CONFIGS) == 2
    if find_spec('mmrotate') is None:  # it has no release for the original stack's mmdet 3.3
        with pytest.raises(ModuleNotFoundError, match='mmrotate'):
            Config.fromfile(path)
        return
    cfg = Config.fromfile(path)
    (tmp_path / 'own.py').write_text(path.read_text().splitlines()[0])  # `_base_`, mmrotate's
    own = Config.fromfile(tmp_path / 'own.py')
    assert cfg.keys() - own.keys() == {'custom_imports', 'custom_hooks'}
    model = train_one_step(cfg, rotated_data)
    data = rotated_data(cfg)
    with torch.no_grad():
        results = build_model(cfg).eval().test_step(data)
    assert len(results) == 2
    assert all(result.pred_instances.bboxes.shape[-1] == 5 for result in results)
    assert type(model.backbone).__name__ == 'LSKAVAN'
