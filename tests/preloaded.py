"""Runs Python scripts in forks of this process, which has imported what they all import.

It prints `ready`, then reads a line of JSON for each script: `argv`, `cwd`, `environ`,
and `out`, the file for what the script prints; and answers with its exit code. Apart
from its quick start, and that no text is formatted twice, a script runs as by
`python script.py`. Nothing of this project is imported here, nor of the toolboxes: that
is left to the script.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

from yapf.yapflib import yapf_api


def format_once(text: str, *more, **how):
    """Format a config as yapf does; MMEngine does so for every checkpoint, in half a second."""
    if text not in formatted:
        formatted[text] = format_code(text, *more, **how)
    return formatted[text]


formatted, format_code = {}, yapf_api.FormatCode
yapf_api.FormatCode = format_once  # before MMEngine imports it

# ruff: noqa: E402
import matplotlib.pyplot  # noqa: F401
import mmcv.ops  # noqa: F401
import mmengine.runner  # noqa: F401
import pycocotools.coco  # noqa: F401
import torchvision  # noqa: F401

for name in ('imagecorruptions', 'imgaug.augmenters', 'scipy.stats', 'sklearn.datasets'):
    with contextlib.suppress(ImportError):  # what a toolbox needs on some stack
        importlib.import_module(name)


def run(job: dict) -> None:
    """Become the script."""
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(job['out'], os.O_WRONLY)
    for number, file in enumerate((null, out, out)):
        os.dup2(file, number)
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['environ'])
    sys.argv = job['argv']
    added = job['environ'].get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), *filter(None, added)]
    runpy.run_path(sys.argv[0], run_name='__main__')


print('ready', flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
