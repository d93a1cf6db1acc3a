"""The set-up of an environment: what it is made of, and what stops it, in one line."""

import stat

import pytest

from conftest import ROOT

INSTALL = ROOT / 'requirements/install.sh'


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab', 'newest'])
def test_pins(stack):
    pins = [
        line
        for line in (ROOT / f'requirements/{stack}.txt').read_text().splitlines()
        if line and not line.startswith('#')
    ]
    assert len([pin for pin in pins if '==' in pin]) == 7


def test_unknown_stack(run, tmp_path):
    printed = run('make', 'setup', 'STACK=mmlab', f'VENV={tmp_path}', code=2)
    assert 'setup: unknown STACK=mmlab; use one of: onedl openmmlab newest' in printed


def test_no_python(run, tmp_path):
    printed = run('bash', INSTALL, 'onedl', tmp_path, code=1, PYTHON='python0')
    assert printed.startswith('setup: python0 not found; install Python 3.11')


def test_wrong_python(run, tmp_path):
    python = script(tmp_path / 'python', 'echo 3.9')
    printed = run('bash', INSTALL, 'onedl', tmp_path, code=1, PYTHON=str(python))
    assert 'are for Python 3.10 to 3.12, ' in printed
    assert 'is 3.9; name another: make PYTHON=' in printed
    assert len(printed.splitlines()) == 1


def test_no_compiler(run, tmp_path):
    for tool in ('bash', 'dirname'):
        (tmp_path / tool).symlink_to(f'/bin/{tool}')
    python = script(tmp_path / 'python', 'case "$*" in *version_info*) echo 3.11;; esac')
    printed = run('env', f'PATH={tmp_path}', 'bash', INSTALL, 'onedl', tmp_path / 'venv', code=1,
                  PYTHON=str(python))  # fmt: skip
    assert printed == 'setup: g++ is missing, mmcv cannot compile; apt-get install g++\n'


def test_mmcv_without_ops(run, tmp_path):
    """pip does as it is told, but what it installed cannot be used."""
    script(tmp_path / 'bin/python', 'case "$*" in *mmcv.ops*) exit 1;; esac')
    printed = run('bash', INSTALL, 'onedl', tmp_path, code=1)
    last = printed.splitlines()[-1]
    assert last.startswith('setup: mmcv came without its compiled ops')
    assert 'pip cache remove' in last
