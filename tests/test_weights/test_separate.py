"""VAN's kernels as 1-D ones."""

import re

import numpy as np
import pytest
import torch

from conftest import SMALL, largest_difference, small, trained
from lska_mm.models.lska import kernel_layout
from lska_mm.weights.resize import separate_kernels


@pytest.mark.parametrize(('attention', 'k'), [('LKA', 23), ('LKA', 35), ('LKA-trivial', 11)])
def test_products_are_found_again(attention, k):
    van = trained(attention=attention, kernel_size=k)
    for name, parameter in van.named_parameters():
        if re.search(r'conv0\.weight|conv_spatial\.weight', name):
            side = parameter.shape[-1]
            rows, columns = torch.randn(2, *parameter.shape[:2], side).double() / side**0.5
            parameter.data = columns[..., None] * rows[..., None, :]
    state, shares = separate_kernels(van.double().state_dict())
    separated = small(attention=f'LS{attention[1:]}', kernel_size=k).double().eval()
    separated.load_state_dict(state)
    assert min(shares.values()) == pytest.approx(1, abs=1e-12)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        difference = largest_difference(van, separated, [(61, 83), (24, 40)], dtype)
        print(f'{attention} k={k}, {dtype}: largest difference of the outputs {difference:.1e}')
        assert difference <= atol


@pytest.mark.parametrize('attention', ['LKA', 'LKA-trivial'])
def test_separated_kernels_are_the_nearest_products(attention):
    source = trained(attention=attention, kernel_size=11).state_dict()
    state, shares = separate_kernels(source)
    assert len(shares) == sum(SMALL['depths']) * len(kernel_layout(attention, 11))
    pairs = {'conv0': ('conv0h', 'conv0v'), 'conv_spatial': ('conv_spatial_h', 'conv_spatial_v')}
    for name, share in shares.items():
        gate, conv = name.rsplit('.', 1)
        row, column = (f'backbone.{gate}.{part}' for part in pairs[conv])
        kept = total = 0
        for channel, kernel in enumerate(source[f'{name}.weight'][:, 0].double().numpy()):
            values = np.linalg.svd(kernel, compute_uv=False)
            kept, total = kept + values[0] ** 2, total + (values**2).sum()
            rows, columns = (state[f'{key}.weight'][channel].flatten() for key in (row, column))
            error = np.linalg.norm(np.outer(columns, rows) - kernel)
            assert error == pytest.approx(np.sqrt((values[1:] ** 2).sum()), rel=1e-5)
            assert rows.norm() == pytest.approx(columns.norm().item(), rel=1e-5)
            assert rows[rows.abs().argmax()] > 0
        assert share == pytest.approx(kept / total, rel=1e-6)
        assert not state[f'{row}.bias'].any()
        assert torch.equal(state[f'{column}.bias'], source[f'{name}.bias'])
