"""Robustness: images corrupted as those of ImageNet-C, and a classifier tested on them."""

import json

import mmcv
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT, load_tool

CONFIG = ROOT / 'demo/lska-van-tiny_digits.py'
CORRUPT = 'tools/dataset_converters/imagenet_c.py'
TEST = 'tools/analysis_tools/imagenet_c.py'
imagenet_c = load_tool(TEST)


def test_all_corruptions_of_an_image_of_ones_own(run, tmp_path):
    mmcv.imwrite(mmcv.imread(str(ROOT / 'demo/nuclei/image.png')), str(tmp_path / 'in/a/b.png'))
    out = ('--out', tmp_path / 'out', '--size', '48x48')
    printed = run('python', CORRUPT, tmp_path / 'in', *out)
    assert printed.count('1 images, 5 severities') == 19
    files = sorted((tmp_path / 'out').glob('*/*/a/b.png'))
    assert len(files) == 19 * 5
    images = [mmcv.imread(str(file)) for file in files]
    assert {image.shape for image in images} == {(48, 48, 3)}
    assert len({image.tobytes() for image in images}) > 90  # few severities alike, if any


def test_imagenet_c_goes_on_where_it_stopped(digits, run, tmp_path):
    """With random weights, on two kinds of corruption of twenty digits."""
    data, checkpoint = tmp_path / 'corrupted', tmp_path / 'random.pth'
    run('python', CORRUPT, digits / 'val', '--out', data, '--size', '64x64', '--per-class', 2,
        '--corruptions', 'gaussian_noise', 'contrast')  # fmt: skip
    init_default_scope('mmpretrain')
    model = MODELS.build(Config.fromfile(CONFIG).model)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    options = [f'{split}_dataloader.dataset.data_root={digits}' for split in ('val', 'test')]

    def test(work_dir, checkpoint=checkpoint, **how):
        words = [CONFIG, checkpoint, data, '--work-dir', tmp_path / work_dir]
        return run('python', TEST, *words, '--cfg-options', *options, **how)

    whole = test('whole')
    results = json.loads((tmp_path / 'whole/imagenet_c.json').read_text())
    top1 = results['top1']
    assert {name: ''.join(values) for name, values in top1.items()} == dict(
        gaussian_noise='12345', contrast='12345'
    )
    assert 'mCE over the 15 standard corruptions: not computed, without shot_noise' in whole

    # What an interruption leaves behind: the results of three folders.
    stopped = tmp_path / 'stopped/imagenet_c.json'
    stopped.parent.mkdir()
    results['top1'] = {'gaussian_noise': {k: top1['gaussian_noise'][k] for k in '123'}}
    stopped.write_text(json.dumps(results))
    again = test('stopped')
    assert again.count('Epoch(test)') == whole.count('Epoch(test)') * 7 // 10
    assert json.loads(stopped.read_text())['top1'] == top1
    for name in ('imagenet_c.md', 'imagenet_c.png'):
        assert (tmp_path / 'stopped' / name).stat().st_size > 0

    torch.save({}, tmp_path / 'other.pth')
    printed = test('whole', tmp_path / 'other.pth', code=1)
    assert 'has results of another checkpoint' in printed


def test_mean_corruption_error():
    """AlexNet itself has CE 100; half its errors give 50."""
    standard, every = imagenet_c.STANDARD, imagenet_c.ALEXNET
    assert (len(standard), len(every)) == (15, 19)
    for share in (1, 0.5):
        top1 = {name: dict.fromkeys('12345', 100 - share * every[name]) for name in every}
        assert imagenet_c.mean_ce(top1, standard) == pytest.approx(100 * share)
        assert imagenet_c.mean_ce(top1, every) == pytest.approx(100 * share)
    del top1['saturate']
    assert imagenet_c.mean_ce(top1, every) is None
    assert imagenet_c.mean_ce(top1, standard) == pytest.approx(50)


@pytest.mark.parametrize('names', [['fog'], ['fog', 'spatter'], list(imagenet_c.ALEXNET)])
def test_every_corruption_looks_different(tmp_path, monkeypatch, names):
    plt = imagenet_c.plt
    monkeypatch.setattr(plt, 'close', lambda figure: None)
    top1 = {name: dict.fromkeys('12345', 50.0) for name in names}
    imagenet_c.plot(top1, 'config, checkpoint', tmp_path / 'out.png')
    (axis,) = plt.gcf().axes
    assert axis.get_title() == 'config, checkpoint'
    looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
    assert len(looks) == len(axis.lines) == len(names)
    dashed = any(line.get_linestyle() == '--' for line in axis.lines)
    assert ('dashed' in plt.gcf().legends[0].get_title().get_text()) == dashed
