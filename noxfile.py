"""The whole suite on every stack that is supported.

    pip install --requirement requirements/nox.txt
    nox                              all of them, one after the other: hours
    nox --session "suite(newest)"    one; nox --list names them

Each is `make test` in a virtual environment of its own, made by
requirements/install.sh the first time. Arguments after -- go to pytest.
"""

import os
import shlex
import subprocess
from pathlib import Path

import nox

# Name: release line (a file of pins in requirements/), Python.
STACKS = {
    'onedl': ('onedl', '3.11'),
    'openmmlab': ('openmmlab', '3.11'),
    'newest': ('newest', '3.11'),
    'onedl-3.10': ('onedl', '3.10'),
    'onedl-3.12': ('onedl', '3.12'),
}


def find_python(version: str) -> str | None:
    """The first interpreter on the PATH that runs: some are shims for one that is not there."""
    for folder in os.get_exec_path():
        path = Path(folder, f'python{version}')
        if path.exists() and not subprocess.run([path, '-c', ''], capture_output=True).returncode:
            return str(path)
    return None


@nox.session(venv_backend='none')
@nox.parametrize('name', list(STACKS), ids=list(STACKS))
def suite(session: nox.Session, name: str) -> None:
    """Set a stack up, and pass the tests on it."""
    stack, version = STACKS[name]
    python = find_python(version)
    if python is None:
        session.error(f'no python{version} on the PATH runs')
    folder = '.venv' if name == 'onedl' else f'.venv-{name}'
    session.run(
        'make', 'test', f'STACK={stack}', f'VENV={folder}', f'PYTHON={python}',
        env=dict(PYTEST_ADDOPTS=shlex.join(session.posargs)), external=True,
    )  # fmt: skip
