"""2-D kernels as the products of 1-D ones."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gate import read_state
from .names import CheckpointError

_DENSE = re.compile(r'(backbone\.block.+\.spatial_gating_unit)\.(conv0|conv_spatial)\.(\w+)')
_PAIRS = dict(conv0=('conv0h', 'conv0v'), conv_spatial=('conv_spatial_h', 'conv_spatial_v'))


@torch.no_grad()
def separate_kernels(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Make LSKA's 1-D kernels of LKA's 2-D ones, as VAN (arXiv:2202.09741) has them.

    Each kernel becomes the nearest product of a column and a row: its first
    singular vectors, each with the root of the singular value, the largest tap
    of the row positive. The bias stays with the column, which comes second.

    Args:
        state_dict: Of a backbone with ``attention='LKA'`` or ``'LKA-trivial'``,
            or a model that has one, in any layout.

    Returns:
        The tensors for ``'LSKA'`` or ``'LSKA-trivial'``, under this package's names,
        and for each 2-D convolution, by name, the share of its energy (sum of squares
        over all channels) that is kept.

    Raises:
        CheckpointError: If these are not the tensors of such a network.
    """
    state, description = read_state(state_dict)
    if not description['attention'].startswith('LKA'):
        raise CheckpointError(
            f'The kernels are 1-D already (attention {description["attention"]}, kernel size '
            f'{description["kernel_size"]}); only 2-D ones (LKA, as of VAN) can be separated.'
        )
    separated, energies = {}, {}
    for key, value in state.items():
        match = _DENSE.fullmatch(key)
        if match is None:
            separated[key] = value
            continue
        row, column = (f'{match[1]}.{name}' for name in _PAIRS[match[2]])
        if match[3] == 'weight':
            rows, columns, share = _separate(value)
            separated[f'{row}.weight'] = rows
            separated[f'{row}.bias'] = value.new_zeros(len(value))
            separated[f'{column}.weight'] = columns
            energies[f'{match[1]}.{match[2]}'.removeprefix('backbone.')] = share
        else:
            separated[f'{column}.bias'] = value
    return separated, energies


def _separate(weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows (C, 1, 1, n), columns (C, 1, n, 1), and the energy of their products."""
    u, s, vh = torch.linalg.svd(weight[:, 0].double())
    rows, columns = vh[:, 0], u[:, :, 0]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    scale = torch.where(largest < 0, -1.0, 1.0) * s[:, :1].sqrt()
    rows, columns = rows * scale, columns * scale
    energy = float(s.square().sum())
    share = float(s[:, 0].square().sum()) / energy if energy else 1.0
    return rows[:, None, None].to(weight), columns[:, None, :, None].to(weight), share
