"""The benchmark of a GPU, for a moment, on whichever device there is."""

import json

import pytest

CODE = """
import sys
sys.path.insert(0, '.dev_scripts')
from pathlib import Path
from benchmarking.gpu import Case, run
from benchmarking.plain_lska_van import PlainLSKAVAN
from lska_mm import LSKAVAN
small = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], ffn_ratios=[8, 8, 4, 4])
def build(arch, kernel_size, train):
    models = dict(plain=PlainLSKAVAN((8, 16, 24, 32), (1, 1, 1, 1), kernel_size))
    models['default'] = LSKAVAN(small, kernel_size)
    models['with_cp' if train else 'deployed'] = LSKAVAN(small, kernel_size, with_cp=train)
    return models
images = (32, (224, 224)) if sys.argv[2] == 'cuda' else (2, (32, 32))
train = Case('tiny', 23, *images, 'bf16', 'NCHW', True)
graphs = train._replace(train=False, precision='fp32', layout='channels_last', compiled=True)
print(run(build, Path(sys.argv[1]), 1e9, sys.argv[2], [train, graphs]))
"""


@pytest.mark.parametrize(
    'device',
    [pytest.param('cpu', marks=pytest.mark.soak), pytest.param('cuda', marks=pytest.mark.gpu)],
    indirect=True,
)
def test_benchmark(device, run, tmp_path):
    printed = run('python', '-c', CODE, tmp_path, device.type)
    content = json.loads((tmp_path / 'benchmark.json').read_text())
    assert content['left_out'] == []
    models = [row['model'] for row in content['rows']]
    assert models[:5] == ['plain', 'default', 'with_cp', 'plain graph', 'default graph']
    assert {f'{a}{b}' for a in ('plain', 'default', 'deployed')
            for b in ('', ' graph', ' compiled', ' compiled graph')} <= set(models)  # fmt: skip
    counted = [row for row in content['rows'] if row['kernels']]  # not on torch 2.1 in training
    assert len(counted) >= 12
    assert all(row['milliseconds'] > row['limit'] > 0 for row in counted)
    assert all(row['kernels'] > 50 for row in counted)
    if device.type == 'cuda':
        assert set(content['profiles']) == {'plain, tiny, NCHW', 'default, tiny, NCHW'}
    assert '| tiny | 23 | ' in printed
    assert (tmp_path / 'benchmark.png').exists()
