"""Parameters, multiply-adds, and what a training keeps."""

import pytest
import torch
from torch import nn

from conftest import load_tool
from lska_mm import LSKAVAN

counting = load_tool('tools/analysis_tools/counting.py')
plain_lska_van = load_tool('.dev_scripts/benchmarking/plain_lska_van.py').plain_lska_van


@pytest.mark.parametrize(
    ('arch', 'parameters', 'multiply_adds'),
    [('tiny', 4_029_000, 0.8326), ('small', 13_732_776, 2.4501), ('base', 26_292_776, 4.9062)],
)
def test_counts_with_head(arch, parameters, multiply_adds):
    costs = counting.count_costs(counting.Classifier(arch, 23, 'LSKA'), (224, 224))
    assert costs['parameters'] == parameters
    assert costs['multiply_adds'] / 1e9 == pytest.approx(multiply_adds, abs=5e-5)


@pytest.mark.parametrize(
    ('attention', 'k', 'millions', 'multiply_adds'),
    [
        ('LSKA', 23, 4.03, 0.83),
        ('LKA', 23, 4.11, 0.86),
        ('LSKA-trivial', 23, 4.06, 0.85),
        ('LKA-trivial', 23, 4.83, 1.15),
        ('LSKA', 53, 4.06, 0.85),
        ('LKA', 53, 4.49, 1.02),
        ('LSKA-trivial', 53, 4.16, 0.88),
        ('LKA-trivial', 53, 8.48, 2.60),
    ],
)
def test_counts_of_the_four_gates(attention, k, millions, multiply_adds):
    """Tiny with head, counted independently of this package."""
    costs = counting.count_costs(counting.Classifier('tiny', k, attention), (224, 224))
    assert costs['parameters'] / 1e6 == pytest.approx(millions, abs=0.005)
    assert costs['multiply_adds'] / 1e9 == pytest.approx(multiply_adds, abs=0.005)


def test_saved_bytes_of_a_chain():
    """The input for the convolution, and one map: what ReLU returns is what the next takes."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert counting.saved_bytes(chain, torch.rand(1, 3, 5, 7)) == 4 * (3 + 4) * 5 * 7


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_memory_in_training(arch):
    image = torch.rand(1, 3, 224, 224)
    plain = counting.saved_bytes(plain_lska_van(arch, 23).train(), image)
    ours = counting.saved_bytes(LSKAVAN(arch).train(), image)
    with_cp = counting.saved_bytes(LSKAVAN(arch, with_cp=True).train(), image)
    print(
        f'{arch}: plain {plain / 2**20:.0f} MiB, default {ours / plain:.2f} of it, '
        f'with_cp {with_cp / plain:.2f}'
    )
    assert ours <= 0.80 * plain
    assert with_cp <= 0.45 * plain
