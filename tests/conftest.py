"""Weights and data that the tests share.

The reference folder holds what the published implementation computes: see
`reference/build_state.py`. Nothing here needs a network.
"""

import argparse
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yapf.yapflib.yapf_api  # noqa: F401  fills its cache before processes race for it
from torch import nn

from lska_mm import LSKAVAN  # registers it too
from reference.build_state import build_image, build_state

ROOT = Path(__file__).parents[1]
REFERENCE = np.load(ROOT / 'tests/reference/outputs.npz')
LONG = (
    'test_docs', 'test_tasks', 'test_setups', 'test_mmdeploy', 'test_tools', 'test_configs',
    'test_kernels',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that two workers end together."""
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def load_tool(name):
    """A script of the repository as a module; it finds those beside it, as a script does."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def published_state(arch='tiny', kernel_size=23):
    """Tensors under the names of the published ImageNet files."""
    state = build_state(arch, kernel_size)
    return {name: torch.as_tensor(value) for name, value in state.items()}


def reference_image(side=96):
    return torch.as_tensor(build_image(2, side))


def published(arch='tiny', k=23, out_indices=(0, 1, 2, 3)):
    """A backbone with the reference weights, in inference."""
    state = published_state(arch, k)
    backbone = LSKAVAN(arch, k, out_indices=out_indices).eval()
    backbone.load_state_dict({key: v for key, v in state.items() if not key.startswith('head')})
    return backbone


def reference_error(stages, arch='tiny', k=23):
    """Largest difference of the stages' outputs from the published ones."""
    return max(
        (stage[:, ::8] - torch.as_tensor(REFERENCE[f'{arch}-k{k}-96/stage{i}'])).abs().max().item()
        for i, stage in enumerate(stages, start=1)
    )


GATE = 'block1.0.attn.spatial_gating_unit'
SMALL = dict(embed_dims=[8, 16], depths=[2, 1], ffn_ratios=[4, 2])


def small(**kwargs):
    torch.manual_seed(0)
    backbone = LSKAVAN(**{**dict(arch=SMALL, kernel_size=11, out_indices=(0, 1)), **kwargs})
    backbone.init_weights()
    return backbone


def trained(**kwargs):
    """A small backbone whose biases, norms and scales are random, too."""
    backbone = small(**kwargs).eval()
    for name, values in backbone.state_dict().items():
        if values.dim() == 1:
            low, high = (0.5, 1.5) if re.search(r'var|norm.*weight', name) else (-0.3, 0.3)
            nn.init.uniform_(values, low, high)
    return backbone


def assert_same(found, expected, tolerance=1e-4):
    """Compare maps in float32, relative to the largest value of each."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().float(), other.detach().float()
        torch.testing.assert_close(one, other, rtol=tolerance,
                                   atol=tolerance * other.abs().max().item())  # fmt: skip


def largest_difference(ours, theirs, sides, dtype=torch.float64):
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    differences = []
    with torch.no_grad():
        for side in sides:
            image = torch.rand(1, 3, *side, dtype=dtype)
            differences += [(a - b).abs().max().item() for a, b in zip(ours(image), theirs(image))]
    return max(differences)


class Bomb:
    """Makes a folder when it is unpickled in the ordinary way."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def written_file(printed):
    return Path(printed.strip().splitlines()[-1].removeprefix('written to '))


def copy_repository(folder):
    """The files of the repository, without what was built or trained in it."""
    files = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, text=True, capture_output=True, check=True
    )
    for name in files.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


@pytest.fixture(scope='session')
def published_file(tmp_path_factory):
    """A file as the authors publish it: tiny, k=23, with a Namespace beside."""
    path = tmp_path_factory.mktemp('published') / 'lska-van-tiny_k23_in1k.pth'
    args = argparse.Namespace(model='van_tiny', lr=1e-3)
    torch.save(dict(state_dict=published_state(), args=args, epoch=299), path)
    return path


@pytest.fixture(scope='session')
def python(tmp_path_factory):
    """A folder with a `python` that runs scripts by `preloaded.py`, all else as it is."""
    folder, script = tmp_path_factory.mktemp('bin'), ROOT / 'tests/preloaded.py'
    (folder / 'python').write_text(
        '#!/bin/sh\n'
        '[ "$1" = -u ] && [ "$2" != -m ] && shift\n'
        f'case $1 in *.py) exec {sys.executable} -IS {script} {folder}/socket "$@" ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    (folder / 'python').chmod(0o755)
    for _ in range(3):  # libraries race for their caches while they are imported
        process = subprocess.Popen(
            [sys.executable, script, folder / 'socket'], text=True, stdout=subprocess.PIPE,
            # Otherwise asking for a GPU would keep the forks from using it.
            env={'OMP_NUM_THREADS': '2', 'PYTORCH_NVML_BASED_CUDA_CHECK': '1', **os.environ},
        )  # fmt: skip
        if process.stdout.readline() == 'ready\n':
            break
        print(f'preloaded.py ended with {process.wait()} before it was ready')
    else:
        raise RuntimeError('preloaded.py does not start')
    yield folder
    process.terminate()
    process.wait()


@pytest.fixture(scope='session')
def run(python):
    """Run a command in the repository as a user would; returns what it printed."""

    def _run(*command, code=0, cwd=ROOT, **env):
        # Two threads: spinning, more of them would slow each other.
        environ = {'OMP_NUM_THREADS': '2', 'PYTHON_EXEC': f'{python}/python', **os.environ, **env}
        environ['PATH'] = f'{python}:{Path(sys.executable).parent}:{environ["PATH"]}'
        result = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stdout[-5000:]
        return result.stdout

    return _run


@pytest.fixture(scope='session')
def train_demo(run, tmp_path_factory):
    """Run the demo of a task with a shorter schedule; returns its folder and what it printed."""

    def _train_demo(task, *options):
        out = tmp_path_factory.mktemp(task)
        words = ('bash', 'demo/run.sh', '--cfg-options', *options)
        return out, run(*words, TASK=task, WORK_DIR=str(out))

    return _train_demo


@pytest.fixture
def main(monkeypatch, capsys):
    """Run a script of the repository in this process; its exit code, and its output or error."""

    def _main(script, *words):
        path, code = ROOT / script, 0
        monkeypatch.setattr(sys, 'argv', [path.name, *map(str, words)])
        monkeypatch.setattr(sys, 'path', [str(path.parent), *sys.path])
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return (code, err if code else out) if isinstance(code, int) else (1, code)

    return _main


@pytest.fixture
def popen(tmp_path):
    """Begin a command in the repository; returns the process, and the file for what it prints."""
    processes = []

    def _popen(*command, **env):
        environ = {**os.environ, **env}
        environ['PATH'] = f'{Path(sys.executable).parent}:{environ["PATH"]}'
        log = tmp_path / 'log.txt'
        with log.open('a') as file:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        processes.append(process)
        return process, log

    yield _popen
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope='session')
def nuclei(run, tmp_path_factory):
    """The embedded data, converted."""
    out = tmp_path_factory.mktemp('nuclei')
    run('python', 'tools/dataset_converters/nuclei.py', '--out', out)
    return out


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """scikit-learn's digits as files."""
    out = tmp_path_factory.mktemp('digits')
    load_tool('tools/dataset_converters/digits.py').convert(out)
    return out


@pytest.fixture(scope='session')
def coco(nuclei, tmp_path_factory):
    """The embedded data under COCO's file names, every nucleus a person."""
    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO['classes']  # the first is 'person'
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    for split in ('train', 'val'):
        shutil.copytree(nuclei / f'coco/{split}', root / f'{split}2017')
        annotations = json.loads((nuclei / f'coco/annotations/{split}.json').read_text())
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(annotations))
    return root
