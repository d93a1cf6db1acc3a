"""Another kernel size: the same function where it can be, or the nearest.

Sizes with the same dilation have the same local part, so that zeros at both ends of
the far part make of one size a larger one that is the same function.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.lska import kernel_layout
from .fit import fit_gate
from .gate import Conv, center, dense_kernel, read_gate, read_state, size_of
from .names import CheckpointError

_GATE = re.compile(r'(backbone\.block(\d+)\.\d+\.attn\.spatial_gating_unit\.)conv0h?\.weight')


@torch.no_grad()
def resize_kernels(
    state_dict: Mapping[str, Any], kernel_size: int | Sequence[int], nearest: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Change the size of the attention kernels.

    The network stays the same function, at the borders too, where the gates of
    that size can be it: larger ones of the same dilation (of 23, 35, 41, 53, 65;
    or 7, 11), any larger ones of the trivial gates, and smaller ones if all that
    is cut off is zero.

    Args:
        state_dict: Of a backbone, or a model that has one, in any layout.
        kernel_size: Of `LSKAVAN`: one for all stages, or one value per stage.
        nearest: Where a gate of that size cannot be the same, take the one whose
            dense kernels differ least from the old ones in the sum of squares.
            The response to a map of zeros, which the biases make, is kept except
            near the border.

    Returns:
        The tensors, under this package's names, and for each gate that had to be
        fitted, by name, the error of each channel (C,): the Frobenius norm of the
        difference of the dense kernels, relative to the old.

    Raises:
        CheckpointError: If these are not the tensors of an LSKA-VAN; if the
            function would change and ``nearest`` is False; if 2-D kernels with
            dilation (``attention='LKA'``) would have to be fitted.
        ValueError: If the size is invalid; names the nearest valid ones.
    """
    state, description = read_state(state_dict)
    attention, stages = description['attention'], len(description['arch']['depths'])
    sizes = [kernel_size] * stages if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != stages:
        raise ValueError(f'kernel_size={sizes}: one for all {stages} stages, or one per stage.')
    layouts = [kernel_layout(attention, size) for size in sizes]
    errors = {}
    for match in filter(None, map(_GATE.fullmatch, list(state))):
        prefix, layout = match[1], layouts[int(match[2]) - 1]
        gate = prefix.removeprefix('backbone.').rstrip('.')
        old = read_gate(state, prefix, layout)
        new = [conv.centered(*shape) for conv, shape in zip(old, layout.values())]
        reason = _why_different(old, new)
        if reason:
            if not nearest:
                raise CheckpointError(
                    f'{gate}: {reason}, so that it cannot be the same function. '
                    'nearest=True (--nearest) takes the nearest kernels instead.'
                )
            new = fit_gate(old, new, attention)
            errors[gate] = _difference(old, new)
        for name, conv in zip(layout, new):
            state[f'{prefix}{name}.weight'], state[f'{prefix}{name}.bias'] = conv[:2]
    return state, errors


def _why_different(old: list[Conv], new: list[Conv]) -> str | None:
    """What keeps kernels that were padded or cropped from being the same, in words."""
    size, new_size = size_of(old), size_of(new)
    pairs = list(zip(old, new))
    if any(a.dilation != b.dilation and _outside(a.weight, (1, 1)) for a, b in pairs):
        return (
            f'the taps of kernel size {size} lie {old[-1].dilation} pixels apart, those of '
            f'{new_size} {new[-1].dilation} apart'
        )
    cut = sum(_outside(a.weight, b.weight.shape[-2:]) for a, b in pairs)
    return f'{cut} taps of kernel size {size} that {new_size} lacks are not zero' if cut else None


def _outside(weight: Tensor, shape: Sequence[int]) -> int:
    """How many taps that are not zero cropping to ``shape`` would cut off."""
    return int((weight != center(center(weight, shape), weight.shape[-2:])).sum())


def _difference(old: list[Conv], new: list[Conv]) -> Tensor:
    """The relative error of each channel's dense kernel, (C,)."""
    kernels = [dense_kernel(old), dense_kernel(new)]
    side = max(kernel.shape[-1] for kernel in kernels)
    before, after = (center(kernel[0], (side, side)).flatten(1) for kernel in kernels)
    return (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-300)


def summarize_errors(errors: Mapping[str, Tensor]) -> str:
    """Say in words how well `resize_kernels` did."""
    if not errors:
        return 'the same function'
    values = torch.cat(list(errors.values()))
    return (
        f'not the same function: dense kernels differ by up to {values.max():.3g}, on average '
        f'{values.mean():.3g} of their norm'
    )
