"""The metafiles: up to date, and found by mmpretrain's API."""

import yaml

from conftest import ROOT


def test_metafiles_and_tables_are_up_to_date(run):
    run('python', '.dev_scripts/metafile.py', '--check')


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
