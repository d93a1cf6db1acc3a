"""The benchmark of a GPU, for a moment, on whichever device there is."""

import json

CODE = """
import sys
sys.path.insert(0, 'tools/analysis_tools')
from pathlib import Path
from benchmark import build
from benchmarking.gpu import Case, run
images = (32, (224, 224)) if sys.argv[2] == 'cuda' else (2, (32, 32))
train = Case('tiny', 23, *images, 'bf16', 'NCHW', True)
graphs = train._replace(train=False, precision='fp32', layout='channels_last', compiled=True)
print(run(build, Path(sys.argv[1]), 1e9, sys.argv[2], [train, graphs]))
"""


def test_benchmark(device, tool, tmp_path):
    printed = tool('-c', CODE, tmp_path, device.type)
    content = json.loads((tmp_path / 'benchmark.json').read_text())
    assert content['left_out'] == []
    models = [row['model'] for row in content['rows']]
    assert models[:3] == ['plain', 'default', 'with_cp']
    assert {f'{a}{b}' for a in ('plain', 'default', 'deployed')
            for b in ('', ' graph', ' compiled', ' compiled graph')} <= set(models)  # fmt: skip
    counted = [row for row in content['rows'] if row['kernels']]  # not on torch 2.1 in training
    assert len(counted) >= 13
    assert all(row['milliseconds'] > row['limit'] > 0 for row in counted)
    assert all(row['kernels'] > 100 for row in counted)
    if device.type == 'cuda':
        assert set(content['profiles']) == {'plain, tiny, NCHW', 'default, tiny, NCHW'}
    assert '| tiny | 23 | ' in printed
    assert (tmp_path / 'benchmark.png').exists()
