"""All that a GPU has to show, in one command of some minutes, the most telling first.

    python tests/gpu/everything.py --out DIR [--limit 540] [--steps NAME ...]

What is common is imported once; each step is a fork of this process with a limit of its
own, and what hangs is killed. In DIR, `steps.jsonl` gets a line after each step, `log.txt`
what they print as they go, and some write a file. On a machine without a GPU the steps
run on its CPU, smaller: a rehearsal.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest

os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # or no fork could use a GPU
ROOT = Path(__file__).resolve().parents[2]
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / '.dev_scripts')]

import measured  # noqa: E402
from measured import GPU  # noqa: E402


def tests(*arguments):
    """A step of tests, `make gpu`'s or, without a GPU, the same that `make test` has."""

    def step(out):
        marks = 'gpu' if GPU else 'not gpu and not soak'
        code = pytest.main(['-m', marks, '-s', '-v', '-p', 'no:cacheprovider', *arguments])
        return dict(code=int(code))

    return step


STEPS = {  # limits in seconds, and what is run
    'machine': (40, measured.machine),
    'kernels': (80, tests('tests/gpu/test_outputs.py', '-k', 'kernels or published')),
    'launches': (20, measured.launches),
    'convolutions': (30, measured.convolutions),
    'block': (90, measured.block),
    'detectors': (150, measured.detectors),
    'backbones': (200, measured.backbones),
    'trained': (300, tests('tests/gpu/test_detectors.py')),
    'rest': (300, tests('tests/gpu', '--ignore', 'tests/gpu/test_detectors.py', '-k',
                        'not kernels and not published')),
}  # fmt: skip


def fork(name, step, limit, out, log):
    """Run a step in a fork, at most so many seconds; return its line."""
    result = out / f'.{name}.json'
    start, child = time.perf_counter(), os.fork()
    if child == 0:
        os.setsid()  # what it starts is killed with it
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        code = 1
        try:
            result.write_text(json.dumps(step(out)))
            code = 0
        except BaseException:  # also what pytest and mmengine end with
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    status = None
    while status is None and time.perf_counter() - start < limit:
        done, ended = os.waitpid(child, os.WNOHANG)
        status = ended if done else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    line = dict(step=name, seconds=round(time.perf_counter() - start, 1))
    line['end'] = 'killed at its limit' if status is None else os.waitstatus_to_exitcode(status)
    if result.exists():
        line.update(json.loads(result.read_text()))
        result.unlink()
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='folder for what is found')
    parser.add_argument('--limit', type=float, default=540, help='seconds for all steps')
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=STEPS)
    args = parser.parse_args()
    out, begin = args.out.resolve(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with (out / 'log.txt').open('a') as log, (out / 'steps.jsonl').open('a') as lines:
        for name in args.steps:
            limit, step = STEPS[name]
            left = args.limit - (time.perf_counter() - begin)
            if left < 10:
                line = dict(step=name, end='no time left')
            else:
                print(f'=== {name}', file=log, flush=True)
                line = fork(name, step, min(limit if GPU else 9 * limit, left), out, log)
            print(json.dumps(line), file=lines, flush=True)
            print(json.dumps(line), flush=True)


if __name__ == '__main__':
    main()
