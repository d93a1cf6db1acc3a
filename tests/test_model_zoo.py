"""The metafiles: up to date, and found by mmpretrain's API."""

import pytest
import yaml
from mmengine.config import Config

from conftest import ROOT, load_tool


@pytest.mark.soak
def test_metafiles_and_tables_are_up_to_date(run):
    run('python', '.dev_scripts/metafile.py', '--check')


@pytest.mark.parametrize(
    'name',
    [
        'classification/lska-van-tiny-k35_4xb128_in1k',
        'detection/mask-rcnn_lska-van-tiny_fpn_1x_coco',
        'segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512',
    ],
)
def test_a_model_of_each_task_is_counted_and_all_are_listed(name):
    metafile = load_tool('.dev_scripts/metafile.py')
    task, _, name = name.partition('/')
    written = yaml.safe_load((ROOT / f'configs/{task}/metafile.yml').read_text())
    found = {model['Name']: model['Metadata'] for model in written['Models']}
    paths = [path for path in (ROOT / 'configs' / task).glob('*.py') if 'dota' not in path.stem]
    assert list(found) == [path.stem for path in sorted(paths, key=metafile.order)]
    cfg = Config.fromfile(ROOT / f'configs/{task}/{name}.py')
    counts = metafile.count(cfg, metafile.TASKS[task]['size'])
    assert tuple(found[name].values()) == counts
    assert metafile.make_table(task, written) in (ROOT / 'docs/model_zoo.md').read_text()


def test_numbers_of_the_paper_s_models():
    """Parameters and multiply-adds of the published classifiers, k = 23."""
    metafile = yaml.safe_load((ROOT / 'configs/classification/metafile.yml').read_text())
    found = {model['Name']: model['Metadata'] for model in metafile['Models']}
    for arch, parameters, multiply_adds in (
        ('tiny', 4_029_000, 0.8326e9),
        ('small', 13_732_776, 2.4501e9),
        ('base', 26_292_776, 4.9062e9),
    ):
        metadata = found[f'lska-van-{arch}_4xb128_in1k']
        assert metadata['Parameters'] == parameters
        assert abs(metadata['FLOPs'] - multiply_adds) < 1e5


def test_mmpretrain_lists_every_classifier():
    import mmpretrain
    from mmpretrain.apis import ModelHub

    ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
    configs = [path.stem for path in (ROOT / 'configs/classification').glob('*.py')]
    assert mmpretrain.list_models('lska*', task='Image Classification') == sorted(configs)
    assert set(configs) < set(mmpretrain.list_models('lska*'))
    model = mmpretrain.get_model('lska-van-tiny-k35_4xb128_in1k')
    assert (type(model.backbone).__name__, model.backbone.kernel_size) == ('LSKAVAN', 35)
