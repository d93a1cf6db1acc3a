"""What the tools share: arguments, configs of any toolbox, and how they end."""

from argparse import ArgumentTypeError
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmengine.config import Config
from mmpretrain.models import ImageClassifier

from conftest import ROOT, load_tool
from lska_mm import cli

IMAGENET = ROOT / 'configs/classification/lska-van-tiny_4xb128_in1k.py'
ADE20K = ROOT / 'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'
COCO = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@pytest.fixture
def parse(monkeypatch):
    """Parse a config and options, with the rank that a launcher sets."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    return lambda *words: cli.base_parser('').parse_args([*map(str, words)])


# --- Arguments ------------------------------------------------------------------


def test_size():
    assert cli.size('800x1216') == (800, 1216)


@pytest.mark.parametrize('text', ['224', '224x', '224X224', '224x224x3', '-1x5', ''])
def test_what_is_no_size(text):
    with pytest.raises(ArgumentTypeError, match=f'{text!r} is not HEIGHTxWIDTH, such as 224'):
        cli.size(text)


def test_png():
    assert cli.png('out/a.png') == Path('out/a.png')
    for path in ('folder', 'a.jpg', 'a.png/b'):
        with pytest.raises(ArgumentTypeError, match=rf'{path} does not end in \.png'):
            cli.png(path)


# --- Configs ----------------------------------------------------------------------


def test_toolbox():
    detector = dict(type='mmdet.RetinaNet')
    assert cli.toolbox(Config(dict(default_scope='mmseg', model=detector))) == 'mmseg'
    assert cli.toolbox(Config(dict(default_scope=None, model=detector))) == 'mmdet'
    assert cli.toolbox(Config(dict(model=detector))) == 'mmdet'
    classifier = dict(type=ImageClassifier)
    assert cli.toolbox(Config(dict(model=classifier))) == 'mmpretrain'


@pytest.mark.parametrize(
    'options',
    [
        '',
        '--no-pin-memory',
        '--no-persistent-workers',
        '--cfg-options train_dataloader.pin_memory=False',
    ],
)
def test_dataloaders_of_a_classifier_are_those_of_mmpretrain(options, parse, monkeypatch):
    own = load_tool(Path(mmpretrain.__file__).parent / '.mim/tools/train.py')
    monkeypatch.setattr('sys.argv', ['train.py', str(IMAGENET), *options.split()])
    expected = own.merge_args(Config.fromfile(IMAGENET), own.parse_args())
    cfg = cli.load_config(parse(IMAGENET, *options.split()), persistent_workers=True)
    for loader in LOADERS:
        assert cfg[loader] == expected[loader]
        assert {'pin_memory', 'persistent_workers', 'collate_fn'} <= set(cfg[loader])


@pytest.mark.parametrize('path', [ADE20K, COCO], ids=['mmseg', 'mmdet'])
def test_other_dataloaders_stay_as_they_are(path, parse):
    cfg = cli.load_config(parse(path), persistent_workers=True)
    assert [cfg[loader] for loader in LOADERS] == [Config.fromfile(path)[key] for key in LOADERS]


def test_work_dir(parse, tmp_path):
    """That of the command, of the config, or of the config's name."""
    (tmp_path / 'net.py').write_text(f"_base_ = '{IMAGENET}'\nwork_dir = 'mine'")
    option = ['--work-dir', 'yours']
    assert cli.load_config(parse(tmp_path / 'net.py', *option)).work_dir == 'yours'
    assert cli.load_config(parse(tmp_path / 'net.py')).work_dir == 'mine'
    assert cli.load_config(parse(IMAGENET)).work_dir == f'work_dirs/{IMAGENET.stem}'


def test_normalize():
    image = torch.tensor([10.0, 20, 30])[None, :, None, None]  # blue, green, red
    norm = dict(mean=[0, 10, 20], std=[1, 2, 5])

    def values(image=image, **cfg):
        return cli.normalize(image, Config(cfg)).flatten().tolist()

    assert values(model={}) == [10, 20, 30]
    assert values(model={}, data_preprocessor=dict(norm, to_rgb=True)) == [30, 5, -2]
    for kind in ('mmdet.DetDataPreprocessor', 'mmseg.SegDataPreProcessor'):
        model = dict(data_preprocessor=dict(norm, type=kind))
        assert values(model=model) == [10, 5, 2]
        model['data_preprocessor']['bgr_to_rgb'] = True
        assert values(model=model) == [30, 5, -2]
    bands = torch.arange(4.0)[None, :, None, None]
    model = dict(data_preprocessor=dict(type='mmseg.SegDataPreProcessor', bgr_to_rgb=True))
    assert values(bands, model=model) == [0, 1, 2, 3]


# --- Output -----------------------------------------------------------------------


def test_markdown():
    table = cli.markdown([['arch', 'k'], ['tiny', 23], ['base', None]])
    assert table == '| arch | k |\n| --- | --- |\n| tiny | 23 |\n| base | None |'


def test_errors_of_a_tool_are_a_line(monkeypatch, capsys):
    def end(error):
        @cli.report_errors(OSError, ValueError)
        def main():
            if error:
                raise error

        main()

    monkeypatch.setattr('sys.argv', ['tools/test.py'])
    end(None)
    for error in (ValueError('9 is too much.'), FileNotFoundError('No data at x.')):
        with pytest.raises(SystemExit, match='1'):
            end(error)
        assert capsys.readouterr().err == f'test.py: {error}\n'
    with pytest.raises(KeyError, match='programmer'):
        end(KeyError('of the programmer'))
