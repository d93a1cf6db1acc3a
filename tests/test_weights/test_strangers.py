"""No way in runs the code that a file brings along; the tools are in test_wrong_input.py."""

import ast
import http.server
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.runner import CheckpointLoader, load_checkpoint

from conftest import ROOT, Bomb, small
from lska_mm import LSKAVAN, load_from_local
from lska_mm.weights.convert import convert
from lska_mm.weights.names import CheckpointError

RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'


@pytest.fixture(params=[True, False], ids=['zip', 'legacy'])
def bomb(tmp_path, monkeypatch, request):
    """A checkpoint with code in it; after the test nothing may have run."""
    monkeypatch.chdir(tmp_path)
    target, path = tmp_path / 'ran', tmp_path / 'bomb.pth'
    content = dict(state_dict={}, args=Bomb(target))
    torch.save(content, path, _use_new_zipfile_serialization=request.param)
    torch.load(path, weights_only=False)
    target.rmdir()  # it works
    yield path
    assert not target.exists()


REFUSED = r'bomb\.pth was refused: it holds posix\.mkdir, and loading that could run code.*LOAD=1'


LOADERS = {
    'load_from_local': load_from_local,
    'convert': lambda path: convert(path, Path('out/new.pth'), lambda state, meta: state),
    'load_from': lambda path: load_checkpoint(LSKAVAN(), path),
    'init_detector': lambda path: init_detector(RETINANET, path, device='cpu'),
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
