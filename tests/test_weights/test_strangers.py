"""No way into the project runs the code that a file brings along."""

import ast
import http.server
import re
import runpy
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint

from conftest import ROOT, small
from lska_mm import LSKAVAN, load_from_local
from lska_mm.weights.convert import convert
from lska_mm.weights.names import CheckpointError
from pickles import Bomb

SEGMENTOR = ROOT / 'demo/lska-van-tiny_fpn_nuclei.py'
CLASSIFIER = ROOT / 'demo/lska-van-tiny_digits.py'


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """A checkpoint with code in it; after the test nothing may have run."""
    monkeypatch.chdir(tmp_path)
    target, path = tmp_path / 'ran', tmp_path / 'bomb.pth'
    torch.save(dict(state_dict={}, args=Bomb(target)), path)
    torch.load(path, weights_only=False)
    target.rmdir()  # it works
    yield path
    assert not target.exists()


REFUSED = r'bomb\.pth was refused: it holds posix\.mkdir, and loading that could run code.*LOAD=1'


# --- In Python -----------------------------------------------------------------------

LOADERS = {
    'load_from_local': load_from_local,
    'convert': lambda path: convert(path, Path('out/new.pth'), lambda state, meta: state),
    'load_from': lambda path: load_checkpoint(LSKAVAN(), path),
    'Pretrained': lambda path: LSKAVAN(
        init_cfg=dict(type='Pretrained', checkpoint=path)
    ).init_weights(),
    'ResizedPretrained': lambda path: LSKAVAN(
        init_cfg=dict(type='ResizedPretrained', checkpoint=path)
    ).init_weights(),
}


@pytest.mark.parametrize('name', LOADERS)
def test_loaders(bomb, name):
    with pytest.raises(CheckpointError, match=REFUSED):
        LOADERS[name](str(bomb))


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """The URL of a folder on this machine; downloads go to another."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '*')
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(('localhost', 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f'http://localhost:{server.server_port}'
        server.shutdown()


@pytest.mark.parametrize('name', ['load_from', 'Pretrained', 'ResizedPretrained'])
def test_url(bomb, serve, name):
    url = f'{serve}/bomb.pth'
    for _ in range(2):  # the second time from the folder of downloads
        with pytest.raises(CheckpointError, match=f'{REFUSED}.*from {url}; delete it'):
            LOADERS[name](url)
    assert (bomb.parent / 'home/hub/checkpoints/bomb.pth').is_file()


def test_url_of_good_weights(serve, tmp_path):
    state = small().state_dict()
    torch.save(state, tmp_path / 'good.pth')
    read = CheckpointLoader.load_checkpoint(f'{serve}/good.pth', 'cpu')
    assert all(torch.equal(value, read[f'backbone.{key}']) for key, value in state.items())
    with pytest.raises(OSError, match='404'):
        CheckpointLoader.load_checkpoint(f'{serve}/bad.pth', 'cpu')


def test_no_other_reader_is_used():
    """Of the functions that unpickle, `torch.load` is called where it is guarded."""
    modules = (
        'torch torch.jit torch.hub pickle joblib dill marshal shelve pandas mmengine np numpy'
    )
    found = []
    paths = [
        path for folder in ('lska_mm', 'tools', 'demo') for path in ROOT.glob(f'{folder}/**/*.py')
    ]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                module, name = ast.unparse(node.func.value), node.func.attr
                if module in modules.split() and re.match(
                    r'load|open|read_pickle|Unpickler', name
                ):
                    found.append((path.name, f'{module}.{name}'))
            if isinstance(node, ast.ImportFrom) and node.module in modules.split():
                names = [alias.name for alias in node.names if 'load' in alias.name]
                found += [(path.name, f'{node.module}.{name}') for name in names]
    assert len(paths) > 30
    assert sorted(found) == [('loader.py', 'torch.load'), ('reader.py', 'torch.load')]


# --- The tools -----------------------------------------------------------------------


def data_options(path):
    """An image for a segmentor to be trained on, which it never is."""
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            folder = path.parent / f'ade/{kind}/{split}'
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / 'demo/nuclei/image.png', folder)
    return [
        '--cfg-options',
        *(f'{split}_dataloader.dataset.data_root=ade' for split in ('train', 'val', 'test')),
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
    ]


def folders(path):
    for severity in range(1, 6):
        (path / f'c/fog/{severity}').mkdir(parents=True)
    return path / 'c'


# Arguments that make a tool read the file ``path``.
TOOLS = {
    'train.py': lambda path: [
        [SEGMENTOR, '--resume', path, *data_options(path)],
        [SEGMENTOR, *data_options(path), f'load_from={path}'],
    ],
    'test.py': lambda path: [[SEGMENTOR, path, *data_options(path)]],
    'model_converters/convert_checkpoint.py': lambda path: [[path, 'out/new.pth']],
    'model_converters/reparameterize_model.py': lambda path: [[path, 'out/new.pth']],
    'deployment/export_onnx.py': lambda path: [[SEGMENTOR, path, 'out/new.onnx']],
    'visualization/attention.py': lambda path: [
        [SEGMENTOR, path, ROOT / 'demo/nuclei/image.png', '--out', 'out/new.png']
    ],
    'visualization/erf.py': lambda path: [
        ['--model', SEGMENTOR, path, '--images', ROOT / 'demo/nuclei', '--out', 'out/new.png',
         '--num-images', '1', '--size', '64x64']
    ],
    'analysis_tools/imagenet_c.py': lambda path: [
        [CLASSIFIER, path, folders(path.parent), '--work-dir', 'work']
    ],
}  # fmt: skip
CONVERTERS = [name for name in TOOLS if 'convert' in name]


def start(tool, arguments, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    monkeypatch.syspath_prepend((ROOT / 'tools' / tool).parent)  # as a script has it
    runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')


def test_every_tool_that_reads_a_checkpoint_is_tested():
    argument = re.compile(
        r"add_argument\(\s*'(checkpoint'|--model'|--resume')|= parse_args\(|converter_parser\("
    )
    paths = [path for path in ROOT.glob('tools/**/*.py') if argument.search(path.read_text())]
    assert sorted(str(path.relative_to(ROOT / 'tools')) for path in paths) == sorted(TOOLS)


@pytest.mark.parametrize('tool', TOOLS)
def test_tools(bomb, tool, monkeypatch, capsys):
    for arguments in TOOLS[tool](bomb):
        with pytest.raises((CheckpointError, SystemExit)) as error:
            start(tool, arguments, monkeypatch)
        if error.type is SystemExit:
            assert error.value.code == 1
            *_, message = capsys.readouterr().err.splitlines()
            assert message.startswith(f'{tool.rpartition("/")[2]}: ')
        else:
            message = str(error.value)
        assert re.search(REFUSED, message)
    assert not (bomb.parent / 'out').exists()


def change(key, function):
    """A file with one tensor changed."""

    def save(state, path):
        name = key if key in state else f'backbone.{key}'
        torch.save({**state, name: function(state[name])}, path)

    return save


def truncate(state, path):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])


BAD = {
    'is damaged': truncate,
    'tensors hold NaN': change('norm1.bias', lambda bias: bias / 0),
    'tensors differ in shape': change('norm1.bias', lambda bias: bias[1:]),
}


@pytest.mark.parametrize('message', BAD)
def test_converters_leave_nothing_behind(tmp_path, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'bad.pth'
    for tool in CONVERTERS:
        BAD[message](small().state_dict(), path)
        [arguments] = TOOLS[tool](path)
        with pytest.raises(SystemExit) as error:
            start(tool, arguments, monkeypatch)
        assert error.value.code == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(tool.rpartition('/')[2])
        assert message in line
        assert [p for p in tmp_path.rglob('*') if p.is_file()] == [path]
