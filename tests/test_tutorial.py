"""demo/tutorial.ipynb runs from its first cell to its last: tiny here, as it is by make soak."""

import json
import re

import pytest

from conftest import ROOT, copy_repository

NOTEBOOK = json.loads((ROOT / 'demo/tutorial.ipynb').read_text())
CELLS = [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']
# What IPython does with a line that begins with an exclamation mark, but in a fork of this
# process: without importing torch again.
FORK = """
import os, runpy, shlex, sys, traceback

def shell(command):
    print(command, flush=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = shlex.split(command)[1:]
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


def as_script():
    """The code of the cells as one program, which says where each begins."""
    parts = [FORK]
    for i, cell in enumerate(CELLS):
        text = re.sub(
            r'^!((?:.*\\\n)*.*)$',
            lambda command: f"shell(f'''{command[1]}''')",
            ''.join(cell['source']),
            flags=re.MULTILINE,
        )
        parts.append(f"print('--- cell {i}', flush=True)\n{text}\n")
    return '\n'.join(parts)


def check_run(run, folder, script):
    """Run the notebook in a copy of the repository; returns what it printed."""
    copy_repository(folder)
    (folder / 'demo/tutorial.py').write_text(script)
    printed = run('python', folder / 'demo/tutorial.py', cwd=folder / 'demo', MPLBACKEND='Agg',
                  OMP_NUM_THREADS='1')  # fmt: skip
    for name in ('erf.png', 'attention.png', 'backbone.onnx', 'config.py'):
        assert (folder / 'work_dirs/tutorial' / name).stat().st_size > 1000
    assert printed.count('largest difference') >= 2
    assert 'stage4 (1, 256, 4, 6)' in printed
    return printed


def test_outputs_are_cleared():
    assert len(CELLS) > 8
    assert not [cell for cell in CELLS if cell['outputs'] or cell['execution_count']]


def test_tiny(run, tmp_path):
    script = as_script()
    assert script.count('TINY = False') == 1
    check_run(run, tmp_path, script.replace('TINY = False', 'TINY = True'))


@pytest.mark.soak
def test_in_full(run, tmp_path):
    """Ten minutes, after which it finds most nuclei."""
    printed = check_run(run, tmp_path, as_script())
    scores = re.findall(r'coco/segm_mAP_50: ([\d.]+)', printed)
    assert len(scores) == 5
    assert float(scores[-1]) > 0.8
