"""Shape bias, and the images that it is measured with."""

from pathlib import Path

import mmcv
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, init_default_scope

from conftest import ROOT, load_tool

TOOL = '.dev_scripts/shape_bias.py'
HEAD = 'subj,session,trial,rt,object_response,category,condition,imagename\n'
shape_bias = load_tool(TOOL)


def test_shape_bias(run, tmp_path):
    """Of a model's six conflicts: three by shape, one by texture, two by neither."""
    answers = ['cat', 'cat', 'dog', 'car', 'oven', 'dog', 'cat']
    images = ['cat1-dog2', 'cat2-dog1', 'cat3-dog1', 'cat1-bear3', 'dog1-cat2', 'dog9-cat1',
              'cat1-cat2']  # fmt: skip
    lines = [f'net,1,{i},NaN,{answer},{image[:3]},NaN,{image}.png\n'
             for i, (answer, image) in enumerate(zip(answers, images))]  # fmt: skip
    (tmp_path / 'net.csv').write_text(HEAD + ''.join(lines))
    people = [f'subject-0{i},1,1,.5,cat,cat,0,0001_cue_dnn_0_cat_00_cat1-dog2.png\n' for i in '12']
    (tmp_path / 'people.csv').write_text(HEAD + ''.join(people))
    picture = tmp_path / 'out/bias.png'
    files = [tmp_path / 'net.csv', tmp_path / 'people.csv']
    printed = run('python', TOOL, *files, '--out', picture)
    assert '| net | 6 | 50.0% | 16.7% | 0.750 |' in printed
    assert '| humans | 2 | 100.0% | 0.0% | 1.000 |' in printed
    assert min(mmcv.imread(str(picture)).shape[:2]) > 200
    by_class = shape_bias.read([tmp_path / 'net.csv'])['net']
    assert {name: d.shape_bias for name, d in by_class.items()} == {'cat': 2 / 3, 'dog': 1}


@pytest.mark.soak
def test_cue_conflict_has_what_its_config_wants(run, tmp_path):
    printed = run('python', '.dev_scripts/cue_conflict.py', '--out', tmp_path)
    assert 'train: 1442 images of 10 classes\nval: 355 images of 10 classes' in printed
    cfg = Config.fromfile(ROOT / 'demo/lska-van-tiny_cue-conflict.py')
    init_default_scope(cfg.default_scope)
    metric = METRICS.build(cfg.test_evaluator)

    sets = {}
    for split in ('train', 'val', 'test'):
        config = {**cfg[f'{split}_dataloader'].dataset, 'data_root': str(tmp_path)}
        sets[split] = DATASETS.build(config)
    for split in ('train', 'val'):
        for info in map(sets[split].get_data_info, range(len(sets[split]))):
            name = Path(info['img_path']).parent.name
            assert info['gt_label'] in getattr(metric, f'{name}_indices')  # counted as that
    classes = {folder.name for folder in (tmp_path / 'train').iterdir()}
    assert len(classes) == 10
    assert len(sets['test']) == len(sets['val'])
    for path in tmp_path.glob('conflict/*/*.png'):
        assert path.name.startswith(path.parent.name)
        assert shape_bias.texture(path.name) in classes - {path.parent.name}
