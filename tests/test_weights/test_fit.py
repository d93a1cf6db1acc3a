"""The nearest kernels of another size."""

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import nn

from conftest import GATE, SMALL, small, trained
from lska_mm import LSKA
from lska_mm.models.lska import split_kernel
from lska_mm.weights.resize import resize_kernels


def spatial_part(state, k, attention='LSKA'):
    """The depth-wise convolutions of the first gate."""
    weights = {key.split(f'{GATE}.')[1]: v for key, v in state.items() if f'{GATE}.' in key}
    gate = LSKA(8, k, attention).double()
    gate.load_state_dict(weights)
    return nn.Sequential(*list(gate.children())[:-1])


def dense_kernel(state, k, attention='LSKA'):
    """What they answer to an impulse, without biases: (C, 131, 131)."""
    convs = spatial_part(state, k, attention)
    for conv in convs:
        nn.init.zeros_(conv.bias)
    impulse = torch.zeros(1, 8, 131, 131, dtype=torch.float64)
    impulse[..., 65, 65] = 1
    return convs(impulse)[0].detach()


@pytest.mark.parametrize(
    ('attention', 'k', 'other'),
    [
        ('LSKA', 11, 23), ('LSKA', 53, 23), ('LSKA', 23, 11), ('LSKA-trivial', 53, 23),
        ('LKA-trivial', 11, 7),
    ],
)  # fmt: skip
def test_nearest_fit(attention, k, other):
    source = trained(attention=attention, kernel_size=k).state_dict()
    state, errors = resize_kernels(source, other, nearest=True)
    again, _ = resize_kernels(source, other, nearest=True)
    assert all(torch.equal(*pair) for pair in zip(state.values(), again.values()))
    small(attention=attention, kernel_size=other).load_state_dict(state)

    # The error that is said is that of the kernels seen from outside.
    old, new = dense_kernel(source, k, attention), dense_kernel(state, other, attention)
    true = (new - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
    assert len(errors) == sum(SMALL['depths'])
    torch.testing.assert_close(errors[GATE], true, rtol=1e-6, atol=1e-6)
    print(f'{attention} {k} as {other}: relative error {true.max():.3f} at most, '
          f'{true.mean():.3f} on average')  # fmt: skip

    zeros = torch.zeros(1, 8, 131, 131, dtype=torch.float64)
    middle = [spatial_part(s, size, attention)(zeros)[0, :, 65, 65]
              for s, size in ((source, k), (state, other))]  # fmt: skip
    assert middle[0].abs().min() > 1e-3
    torch.testing.assert_close(*middle, rtol=1e-6, atol=1e-6)
    if 'trivial' in attention:  # the nearest is the middle of the old
        inside = np.s_[:, 65 - other // 2 : 66 + other // 2, 65 - other // 2 : 66 + other // 2]
        torch.testing.assert_close(new[inside], old[inside])


def row_kernel(local, far, dilation):
    dilated = np.zeros((len(far) - 1) * dilation + 1)
    dilated[::dilation] = far
    return np.convolve(local, dilated)


@pytest.mark.parametrize(('k', 'other'), [(11, 23), (53, 23)])
def test_another_optimizer_finds_nothing_nearer(k, other):
    source = trained(kernel_size=k).double().state_dict()
    state, _ = resize_kernels(source, other, nearest=True)
    local, far, dilation = split_kernel(other)
    rng = np.random.default_rng(0)
    names = [f'{GATE}.{name}.weight' for name in ('conv0h', 'conv_spatial_h')]

    def distance(taps, target):
        return row_kernel(taps[:local], taps[local:], dilation) - target

    for channel in range(4):
        old = row_kernel(*(source[name][channel].flatten().numpy() for name in names),
                         split_kernel(k).dilation)  # fmt: skip
        target = np.zeros(other)
        width = min(k, other)
        target[(other - width) // 2 :][:width] = old[(k - width) // 2 :][:width]
        ours = np.concatenate([state[f'backbone.{name}'][channel].flatten() for name in names])
        starts = rng.standard_normal((10, local + far))
        theirs = min(np.linalg.norm(least_squares(distance, start, args=(target,)).fun)
                     for start in starts)  # fmt: skip
        assert np.linalg.norm(distance(ours, target)) <= theirs * (1 + 1e-4)


def test_channels_of_zeros_stay_zero():
    source = trained(kernel_size=11).state_dict()
    for key, value in source.items():
        if f'{GATE}.conv' in key and value.dim() == 4 and 'conv1' not in key:
            value[0] = 0
    state, errors = resize_kernels(source, 23, nearest=True)
    assert errors[GATE][0] == 0
    assert not dense_kernel(state, 23)[0].any()
    assert all(value.isfinite().all() for value in state.values())
