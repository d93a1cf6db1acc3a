"""Gates and kernel sizes compared: costs, and how far the network sees."""

import csv
import json

import mmcv
import pytest
import torch

from conftest import load_tool
from lska_mm import LSKAVAN
from lska_mm.models.archs import ARCHS
from lska_mm.models.lska import ATTENTIONS

TOOL = 'tools/analysis_tools/compare_kernels.py'
QUICK = ['--size', '64x64', '--kernel-sizes', 7, 11]
erf = load_tool('tools/visualization/erf.py')


def network_field(depths, k):
    """Side of what a point of the last map may depend on, in pixels."""
    side = stride = 1
    for depth, patch, step in zip(depths, (7, 3, 3, 3), (4, 2, 2, 2)):
        side += (patch - 1) * stride
        stride *= step
        side += depth * (k - 1 + 3 - 1) * stride  # gate and MLP
    return side


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_network_field_is_where_gradients_end(attention):
    arch = dict(embed_dims=[8, 8], depths=[1, 1], ffn_ratios=[1, 1])
    torch.manual_seed(0)
    backbone = LSKAVAN(arch, 7, attention, out_indices=(1,)).double().eval()
    field = erf.effective_receptive_field(backbone, torch.rand(1, 3, 160, 160).double())
    rows, columns = (field > 0).nonzero(as_tuple=True)
    sides = [int(places.max() - places.min()) + 1 for places in (rows, columns)]
    # Stride 4: 7, gate 6 x 4, MLP 2 x 4; 2 x 4 more and stride 8: 6 x 8, 2 x 8.
    assert [network_field([1, 1], 7)] * 2 == sides == [111, 111]


@pytest.mark.parametrize(
    'more', [['--time'], pytest.param([], marks=pytest.mark.soak)], ids=['timed', 'counted']
)
def test_compare_kernels(run, tmp_path, more):
    gates = ['LSKA'] if more else ['LSKA', 'LKA']
    words = [*QUICK, '--attentions', *gates, '--out', tmp_path / 'out', *more]
    printed = run('python', TOOL, *words)
    out = tmp_path / 'out/compare_kernels'
    rows = json.loads(out.with_suffix('.json').read_text())
    expected = [(gate, k) for gate in gates for k in (7, 11)]
    assert [(row['attention'], row['kernel_size']) for row in rows] == expected
    assert all(('milliseconds' in row) == bool(more) for row in rows)
    for row in rows:
        k = row['kernel_size']
        assert row['gate_field'] == k
        assert row['network_field'] == network_field(ARCHS['tiny']['depths'], k)
    with out.with_suffix('.csv').open(newline='') as file:
        assert [row['saved_bytes'] for row in csv.DictReader(file)] == [
            str(row['saved_bytes']) for row in rows
        ]
    table = out.with_suffix('.md').read_text()
    assert table in printed
    assert table.count('\n') == 2 + len(rows)
    assert min(mmcv.imread(str(out.with_suffix('.png'))).shape[:2]) > 200
