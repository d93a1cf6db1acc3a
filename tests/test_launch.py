"""What the tools check before they build or load anything, and how they end."""

import pytest
from mmengine.config import Config

from conftest import ROOT
from lska_mm.launch import build_runner, check_data, report_errors

ADE20K = ROOT / 'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'
IMAGENET = ROOT / 'configs/classification/lska-van-tiny_4xb128_in1k.py'


def config(path, data_root):
    cfg = Config.fromfile(path)
    cfg.train_dataloader.dataset.data_root = str(data_root)
    return cfg


def test_ade20k_without_annotations(tmp_path):
    (tmp_path / 'images/training').mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        check_data(config(ADE20K, tmp_path), 'train')
    assert f'No data at {tmp_path}/annotations/training.' in str(error.value)
    assert 'train_dataloader.dataset.data_prefix.seg_map_path' in str(error.value)


def test_imagenet_without_a_split(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'/train\. .*train_dataloader\.dataset\.split'):
        check_data(config(IMAGENET, tmp_path), 'train')


def test_imagenet_with_an_empty_class(tmp_path):
    for name in ('n01440764', 'n01443537', 'n01484850'):
        (tmp_path / 'train' / name).mkdir(parents=True)
    (tmp_path / 'train/n01440764/1.JPEG').touch()
    cfg = config(IMAGENET, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r'No image of 2 classes in .*train: n01443537, n0'
    ):
        check_data(cfg, 'train')
    # A list of images decides instead, where there is one.
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/train.txt').touch()
    check_data(cfg, 'train')


def test_a_strategy_for_several_processes_in_one():
    cfg = Config(
        dict(launcher='none', runner_type='FlexibleRunner', strategy=dict(type='DDPStrategy'))
    )
    with pytest.raises(ValueError, match=r'DDPStrategy is for several processes: bash tools/dist'):
        build_runner(cfg)


def test_errors_of_a_tool_are_a_line(capsys):
    def end(error):
        @report_errors(OSError, ValueError)
        def main():
            if error:
                raise error

        return main()

    assert end(None) == 0
    assert end(ValueError('9 is too much.')) == 1
    assert end(FileNotFoundError('No data at x.')) == 1
    assert capsys.readouterr().err.splitlines() == [
        'test_launch.py: 9 is too much.',
        'test_launch.py: No data at x.',
    ]
    with pytest.raises(KeyError, match='programmer'):
        end(KeyError('of the programmer'))
