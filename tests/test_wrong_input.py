"""Every tool ends with one line where a file is not what it should be, and writes nothing."""

import runpy
import shutil
import sys

import pytest
import torch

from conftest import ROOT

DIGITS = ROOT / 'demo/lska-van-tiny_digits.py'
IMAGE = ROOT / 'demo/nuclei/image.png'


@pytest.fixture
def files(digits, tmp_path, monkeypatch):
    """A folder to work in, with a folder, a text, and weights of no known network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits)
    for severity in range(1, 6):
        (tmp_path / f'corrupted/fog/{severity}').mkdir(parents=True)
    (tmp_path / 'text.txt').write_text('not what you think')
    (tmp_path / 'empty').write_text('')
    shutil.copy(DIGITS, tmp_path / 'config.py')
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    return tmp_path


# Arguments, of which CONFIG, CHECKPOINT, IMAGE and FOLDER are right but for one.
TOOLS = {
    'train.py': 'CONFIG --resume CHECKPOINT',
    'test.py': 'CONFIG CHECKPOINT',
    'convert_checkpoint.py': 'CHECKPOINT out/new.pth',
    'model_converters/reparameterize_model.py': 'CONFIG CHECKPOINT out/new.pth',
    'model_converters/resize_weights.py': 'CHECKPOINT out/new.pth --kernel-size 53',
    'model_converters/van2lska.py': 'CHECKPOINT out/new.pth',
    'deployment/export_onnx.py': 'CONFIG CHECKPOINT out/new.onnx',
    'visualization/attention.py': 'CONFIG CHECKPOINT IMAGE --out out/new.png',
    'visualization/erf.py': '--model CONFIG CHECKPOINT --images FOLDER --out out/new.png',
    'analysis_tools/imagenet_c.py': 'CONFIG CHECKPOINT corrupted --work-dir work',
    'analysis_tools/shape_bias.py': 'CSV --out out/new.png',
    'analysis_tools/seeds.py': 'WORK_DIR',
    'dataset_converters/imagenet_c.py': 'FOLDER --out out --corruptions fog',
    'dataset_converters/nuclei.py': 'FOLDER --out out',
}
WRONG = {
    'CONFIG': {
        'folder': 'folder is a folder, not a config file.',
        'missing.py': 'No config at missing.py.',
        'config': 'No config at config. There is config.py.',
    },
    'CHECKPOINT': {
        'folder': 'folder is a folder; name a checkpoint file in it.',
        'missing.pth': 'No checkpoint at missing.pth. ',
        'text.txt': 'text.txt is damaged, or not a checkpoint',
        'empty': 'empty is damaged, or not a checkpoint',
        'other.pth': 'other.pth',
    },
    'IMAGE': {
        'folder': 'No image at folder.',
        'missing.png': 'No image at missing.png.',
        'text.txt': 'text.txt is not an image.',
        'empty': 'empty is not an image.',
    },
    'FOLDER': {'missing': 'missing', 'folder': 'folder'},
    'CSV': {'folder': 'folder', 'missing.csv': 'missing.csv', 'empty': 'empty'},
    'WORK_DIR': {'folder': 'folder', 'missing': 'missing'},
}
CELLS = [
    (tool, kind, wrong)
    for tool, words in TOOLS.items()
    for kind in WRONG
    if kind in words
    for wrong in WRONG[kind]
]


@pytest.mark.parametrize(('tool', 'kind', 'wrong'), CELLS)
def test_one_line(files, published_file, monkeypatch, capsys, tool, kind, wrong):
    right = dict(CONFIG=DIGITS, CHECKPOINT=published_file, IMAGE=IMAGE, FOLDER=IMAGE.parent)
    words = [str({**right, kind: wrong}.get(word, word)) for word in TOOLS[tool].split()]
    name = tool.rpartition('/')[2]
    monkeypatch.setattr(sys, 'argv', [name, *words])
    monkeypatch.setattr(sys, 'path', [str((ROOT / 'tools' / tool).parent), *sys.path])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert exit_.value.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    print(f'| {name} | {kind} | {wrong} | {last} |')
    assert last.startswith(f'{name}: ')
    assert WRONG[kind][wrong] in last
    assert not list(files.glob('out/*.*'))
