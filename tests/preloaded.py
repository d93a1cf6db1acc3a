"""Runs Python scripts in forks of this process, which has imported what they all import.

    python preloaded.py SOCKET            waits at SOCKET for scripts; prints `ready`
    python preloaded.py SOCKET X.py ...   has it run `python X.py ...`; ends as that does

Apart from its quick start, and that no text is formatted twice, a script runs as by
`python script.py`. Nothing of this project is imported here, nor of the toolboxes: that
is left to the script.
"""

import json
import os
import socket
import sys


def ask(path: str, argv: list[str]) -> int:
    """Have a script run with the streams, folder and environment of this process."""
    streams = [f'/proc/{os.getpid()}/fd/{number}' for number in (1, 2)]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        file = client.makefile('rw')
        job = dict(argv=argv, cwd=os.getcwd(), environ=dict(os.environ), streams=streams)
        print(json.dumps(job), file=file, flush=True)
        return int(file.readline())


if len(sys.argv) > 2:
    sys.exit(ask(sys.argv[1], sys.argv[2:]))

# ruff: noqa: E402
import atexit
import contextlib
import gc
import importlib
import runpy
import threading
from pathlib import Path

from yapf.yapflib import yapf_api


def format_once(text: str, *more, **how):
    """Format a config as yapf does; MMEngine does so for every checkpoint, in half a second."""
    if text not in formatted:
        formatted[text] = format_code(text, *more, **how)
    return formatted[text]


formatted, format_code = {}, yapf_api.FormatCode
yapf_api.FormatCode = format_once  # before MMEngine imports it

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
    for number, name in enumerate((os.devnull, *job['streams'])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(name, flags), number)
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['environ'])
    sys.argv = job['argv']
    added = job['environ'].get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), *filter(None, added)]
    code: int | str | None = 0
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    # To take an interpreter of so many modules down takes 1.5 s: all but that.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def serve(path: str) -> dict:
    """Wait for scripts; returns, in a fork for each, what to run."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print('ready', flush=True)
        while True:
            connection, _ = server.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with connection:
                if os.fork():
                    continue
                file = connection.makefile('rw')
                job, child = json.loads(file.readline()), os.fork()
                if not child:
                    return job
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                print(code, file=file, flush=True)
                os._exit(0)


gc.freeze()  # or it would be copied in each fork
run(serve(sys.argv[1]))
