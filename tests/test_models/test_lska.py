import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lska_mm.models.lska import ATTENTIONS, LSKA, split_kernel

PUBLISHED = [7, 11, 23, 35, 53]
SIZES = [*PUBLISHED, 41, 65]
# (local, far, dilation), written out by hand.
SPLITS = {
    7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3),
    41: (5, 13, 3), 53: (5, 17, 3), 65: (5, 21, 3),
}  # fmt: skip


@pytest.mark.parametrize('k', SIZES)
def test_split_kernel(k):
    assert split_kernel(k) == SPLITS[k]
    assert split_kernel(k).kernel_size == k


def test_valid_sizes_are_those_of_two_progressions():
    valid = {2 * far + 1 for far in (1, 3, 5)} | {3 * far + 2 for far in range(5, 41, 2)}
    for k in range(-3, 120):
        if k in valid:
            split_kernel(k)
        else:
            with pytest.raises(ValueError, match='cannot be split'):
                split_kernel(k)


@pytest.mark.parametrize(
    ('k', 'nearest'), [(24, '23 and 29'), (8, '7 and 11'), (2, '7'), (-5, '7')]
)
def test_invalid_size_names_its_neighbours(k, nearest):
    with pytest.raises(ValueError, match=rf'kernel_size={k} .*: {nearest} \(published'):
        LSKA(4, k)


@pytest.mark.parametrize('k', [23.0, '23', None])
def test_kernel_size_must_be_an_integer(k):
    with pytest.raises(ValueError, match='kernel_size='):
        LSKA(4, k)


def test_unknown_attention_names_the_valid_ones():
    with pytest.raises(ValueError, match=', '.join(ATTENTIONS)):
        LSKA(4, 23, 'SKA')


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('k', PUBLISHED)
def test_receptive_field_is_exactly_k_by_k(attention, k):
    gate = LSKA(1, k, attention)
    spatial = nn.Sequential(*list(gate.children())[:-1])
    for conv in spatial:
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
    size = 2 * k + 1
    impulse = torch.zeros(1, 1, size, size)
    impulse[..., k, k] = 1
    seen = spatial(impulse)[0, 0] != 0
    expected = torch.zeros(size, size, dtype=torch.bool)
    first, last = k - k // 2, k + k // 2 + 1
    expected[first:last, first:last] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize('k', PUBLISHED)
def test_equals_the_dense_convolution_of_the_outer_product(k):
    torch.manual_seed(0)
    channels = 3
    gate = LSKA(channels, k).double()
    for conv in gate:
        nn.init.zeros_(conv.bias)
    nn.init.dirac_(gate.conv1.weight)

    def dense_1d(near, far):
        dilated = np.zeros((far.numel() - 1) * split_kernel(k).dilation + 1)
        dilated[:: split_kernel(k).dilation] = far.detach().flatten().numpy()
        return np.convolve(near.detach().flatten().numpy(), dilated)

    dense = torch.stack(
        [
            torch.as_tensor(
                np.outer(
                    dense_1d(gate.conv0v.weight[c], gate.conv_spatial_v.weight[c]),
                    dense_1d(gate.conv0h.weight[c], gate.conv_spatial_h.weight[c]),
                )
            )
            for c in range(channels)
        ]
    )[:, None]
    assert dense.shape[-2:] == (k, k)

    # Zeros far enough beyond the border, so that both see the same of them.
    x = functional.pad(torch.randn(2, channels, 12, 9, dtype=torch.float64), [k] * 4)
    expected = x * functional.conv2d(x, dense, padding=k // 2, groups=channels)
    torch.testing.assert_close(gate(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('grad', [True, False])
def test_another_number_of_channels_is_an_error(grad):
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match='to have 8 channels, but got 16 channels'),
    ):
        LSKA(8)(torch.rand(1, 16, 5, 7))
