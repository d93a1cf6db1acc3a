"""The tensors of a gate: its depth-wise convolutions, and the dense kernel they are together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .match import describe
from .names import CheckpointError, convert_state_dict

Layout = dict[str, tuple[tuple[int, int], int]]  # what `kernel_layout` returns


def read_state(
    state_dict: Mapping[str, Any], source: str = 'The file'
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors under this package's names, and what they are."""
    state = convert_state_dict(state_dict, source)
    description = describe(state)
    if description is None:
        names = ', '.join(list(state)[:3]) or 'none'
        raise CheckpointError(
            f'{source} holds no LSKA-VAN ({len(state)} tensors, first: {names}).'
        )
    return state, description


class Conv(NamedTuple):
    """One of the depth-wise convolutions of a gate."""

    weight: Tensor  # (C, 1, height, width), both odd
    bias: Tensor  # (C,)
    dilation: int

    def centered(self, shape: Sequence[int], dilation: int) -> 'Conv':
        """With zeros around the kernel, or without its outer taps."""
        return Conv(center(self.weight, shape), self.bias, dilation)


def center(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad or crop (..., H, W) to ``shape``, the same on opposite sides."""
    rows, columns = ((new - old) // 2 for new, old in zip(shape, x.shape[-2:]))
    return F.pad(x, [columns, columns, rows, rows])


def read_gate(state: Mapping[str, Any], prefix: str, layout: Layout) -> list[Conv]:
    """The convolutions of a gate, in the order they are applied."""
    keys = [f'{prefix}{name}.{kind}' for name in layout for kind in ('weight', 'bias')]
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f'{missing[0]} is missing.')
    tensors = [state[key] for key in keys]
    dilation = (tensors[0].shape[-1] + 1) // 2  # the local part is 2 * dilation - 1 long
    return [
        Conv(weight, bias, dilation if 'spatial' in name else 1)
        for name, weight, bias in zip(layout, tensors[::2], tensors[1::2])
    ]


def size_of(convs: Sequence[Conv]) -> int:
    """Return the longer side of the dense kernel."""
    height, width = (
        1 + sum(conv.dilation * (conv.weight.shape[axis] - 1) for conv in convs) for axis in (2, 3)
    )
    return max(height, width)


def dense_kernel(convs: Sequence[Conv]) -> Tensor:
    """The dense kernel that convolutions are together, (1, C, H, W)."""
    kernel = convs[0].weight.double().transpose(0, 1)
    for conv in convs[1:]:
        kernel = F.conv_transpose2d(
            kernel, conv.weight.double(), groups=len(conv.weight), dilation=conv.dilation
        )
    return kernel
