"""Change the attention kernels, or the image channels, in the tensors of a network.

Each function takes the tensors of a backbone, or of a model that has one, in any layout, and
returns them under this package's names. All other tensors are unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..models.archs import one_each
from ..models.lska import kernel_layout
from .match import read_state
from .names import CheckpointError


class Conv(NamedTuple):
    """A depth-wise convolution of a gate."""

    weight: Tensor  # (C, 1, height, width), both odd
    bias: Tensor  # (C,)
    dilation: int


def _gates(state: Mapping[str, Any], found: Mapping) -> Iterator[tuple[int, str, dict[str, Conv]]]:
    """Yield the stage, the name and the convolutions, in their order, of each gate."""
    depths = found['arch']['depths']
    for stage, size in enumerate(one_each('kernel_size', found['kernel_size'], len(depths))):
        layout = kernel_layout(found['attention'], size)
        for block in range(depths[stage]):
            gate = f'block{stage + 1}.{block}.attn.spatial_gating_unit'
            convs = {}
            for name, (_, dilation) in layout.items():
                conv = f'backbone.{gate}.{name}'
                convs[name] = Conv(state[f'{conv}.weight'], state[f'{conv}.bias'], dilation)
            yield stage, gate, convs


def _center(x: Tensor, height: int, width: int) -> Tensor:
    """Pad or crop (..., H, W), the same on opposite sides."""
    rows, columns = (height - x.shape[-2]) // 2, (width - x.shape[-1]) // 2
    return F.pad(x, [columns, columns, rows, rows])


def _dense(convs: Sequence[Conv]) -> Tensor:
    """Return the dense kernel that is equal to a chain of convolutions, (C, H, W)."""
    kernel = convs[0].weight.double().transpose(0, 1)
    for conv in convs[1:]:
        kernel = F.conv_transpose2d(
            kernel, conv.weight.double(), groups=len(conv.weight), dilation=conv.dilation
        )
    return kernel[0]


@torch.no_grad()
def resize_kernels(
    state_dict: Mapping[str, Any], kernel_size: int | Sequence[int], nearest: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Change the size of the attention kernels to ``kernel_size``, as in `LSKAVAN`.

    The network computes the same function, at the borders too, for larger sizes of the same
    dilation (23, 35, 41, 53, 65; or 7, 11), whose far part is padded with zeros; for all
    larger sizes of the trivial gates; and for smaller sizes if everything cut off is zero.
    Other sizes are refused or, with ``nearest``, get the kernels whose dense kernels are
    closest to the old ones by least squares; the response to a map of zeros, from the
    biases, is kept except near the border.

    Returns:
        The tensors, and the error of each gate that was fitted, by name: for each channel
        (C,), the norm of the difference of the dense kernels, relative to the old one.

    Raises:
        CheckpointError: If these are not the tensors of a whole LSKA-VAN; if the function would
            change without ``nearest``; if dilated 2-D kernels would have to be fitted.
        ValueError: If the size is invalid; names the nearest valid ones.
    """
    state, found = read_state(state_dict)
    sizes = one_each('kernel_size', kernel_size, len(found['arch']['depths']))
    layouts = [kernel_layout(found['attention'], size) for size in sizes]
    errors = {}
    for stage, gate, convs in _gates(state, found):
        old = list(convs.values())
        new = [Conv(_center(conv.weight, *shape), conv.bias, dilation)
               for conv, (shape, dilation) in zip(old, layouts[stage].values())]  # fmt: skip
        lost = sum(_outside(a, b) for a, b in zip(old, new))
        if lost and not nearest:
            raise CheckpointError(
                f'{gate}: kernel size {sizes[stage]} has no place for {lost} nonzero taps; the '
                'function would change. nearest=True (--nearest) takes the nearest kernels '
                'instead.'
            )
        if lost:
            new = _fit(old, new, found['attention'])
            before, after = _dense(old), _dense(new)
            side = max(*before.shape, *after.shape)
            before, after = (_center(x, side, side).flatten(1) for x in (before, after))
            errors[gate] = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-300)
        for name, conv in zip(convs, new):
            state[f'backbone.{gate}.{name}.weight'] = conv.weight
            state[f'backbone.{gate}.{name}.bias'] = conv.bias
    return state, errors


def _outside(old: Conv, new: Conv) -> int:
    """Count the nonzero taps that do not fit into the new kernel."""
    height, width = new.weight.shape[-2:] if old.dilation == new.dilation else (1, 1)
    inside = _center(_center(old.weight, height, width), *old.weight.shape[-2:])
    return int((old.weight != inside).sum())


def _fit(old: list[Conv], new: list[Conv], attention: str) -> list[Conv]:
    """Return the gate nearest to ``old`` with the shapes of ``new``, its cropped copy."""
    if attention == 'LKA':
        raise CheckpointError(
            'Dilated 2-D kernels (attention LKA) cannot be fitted; make them 1-D first, with '
            'convert_checkpoint.py --separate.'
        )
    new = list(new)  # the nearest for kernels in one step
    # For separable kernels, the best fit of each axis is the best fit of both.
    for axis in (0, 1) if attention == 'LSKA' else ():
        local, far = new[axis], new[axis + 2]
        m, n = (conv.weight[0].numel() for conv in (local, far))
        side = m + far.dilation * (n - 1)
        target = _center(_dense(old[axis::2]).flatten(1)[:, None], 1, side)[:, 0]
        left, right = _factorize(target, m, n, far.dilation)
        # The scale is split between the two as before, because of the bias between them:
        # the local part keeps its norm and the sign of its sum.
        before = old[axis].weight.double().flatten(1)
        sign = left.sum(1, keepdim=True) * before.sum(1, keepdim=True)
        scale = before.norm(dim=1, keepdim=True).clamp_min(1e-30).copysign(sign)
        for i, values in ((axis, left * scale), (axis + 2, right / scale)):
            weight = new[i].weight
            new[i] = new[i]._replace(weight=values.reshape(weight.shape).to(weight))
    bias = new[-1].bias + _response_to_zeros(old) - _response_to_zeros(new)
    return [*new[:-1], new[-1]._replace(bias=bias.to(new[-1].bias))]


def _factorize(target: Tensor, local: int, far: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the taps (C, local) and (C, far) whose dense kernel is nearest to ``target`` (C, K).

    The first have norm 1 or 0. By alternating least squares: with one part fixed, the dense
    kernel is linear in the other. As it ends in local minima, the best of several starts is
    returned: the singular vectors of a matrix (local, far) in which each pixel is divided
    equally among the products of taps that lie on it.
    """
    norm = target.norm(dim=1, keepdim=True).clamp_min(1e-300)
    i, j = torch.arange(local)[:, None], torch.arange(far)
    pixels = i + dilation * j  # on which the product of two taps lies, (local, far)
    shares = (target / norm / torch.bincount(pixels.flatten()))[:, pixels]
    right = torch.linalg.svd(shares, full_matrices=False).Vh.transpose(0, 1)  # (starts, C, far)
    targets = (target / norm).expand(len(right), -1, -1)
    for _ in range(50):
        left = _solve(right[..., None, :], pixels, i, targets)
        left = left / left.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        right = _solve(left[..., None], pixels, j, targets)
    products = (left[..., None] * right[..., None, :]).flatten(2)
    dense = torch.zeros_like(targets).index_add(2, pixels.flatten(), products)
    best = (dense - targets).norm(dim=-1).argmin(0), torch.arange(len(target))
    return left[best], right[best] * norm


def _solve(fixed: Tensor, pixels: Tensor, taps: Tensor, target: Tensor) -> Tensor:
    """Return the taps (..., n) that, with the ``fixed`` ones, best fit ``target`` (..., K)."""
    matrix = target.new_zeros(*target.shape, taps.numel())
    matrix[..., pixels, taps] = fixed
    ridge = 1e-12 * torch.eye(taps.numel(), dtype=target.dtype)  # for channels of zeros
    return torch.linalg.solve(matrix.mT @ matrix + ridge, matrix.mT @ target[..., None])[..., 0]


def _response_to_zeros(convs: list[Conv]) -> Tensor:
    """Return the response to a map of zeros, far from the border, (C,)."""
    response = torch.zeros_like(convs[0].bias, dtype=torch.float64)
    for conv in convs:
        response = response * conv.weight.double().sum((1, 2, 3)) + conv.bias.double()
    return response


def summarize_errors(errors: Mapping[str, Tensor]) -> str:
    """Describe in words the errors of `resize_kernels`."""
    if not errors:
        return 'the same function'
    values = torch.cat(list(errors.values()))
    return (
        f'not the same function: dense kernels differ by up to {values.max():.3g} of their norm, '
        f'{values.mean():.3g} on average'
    )


@torch.no_grad()
def separate_kernels(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Turn LKA's 2-D kernels, as in VAN (arXiv:2202.09741), into LSKA's 1-D ones.

    Each kernel becomes the nearest product of a column and a row: its first
    singular vectors, each with the root of the singular value, the largest tap
    of the row positive. The bias stays with the column, which comes second.

    Returns:
        The tensors for ``attention='LSKA'`` or ``'LSKA-trivial'``, and the
        share of the energy (sum of squares) kept of each 2-D convolution, by name.

    Raises:
        CheckpointError: If these are not the tensors of a network with 2-D kernels.
    """
    state, found = read_state(state_dict)
    if not found['attention'].startswith('LKA'):
        raise CheckpointError(
            f'The kernels are 1-D already (attention {found["attention"]}, kernel size '
            f'{found["kernel_size"]}); only 2-D ones (LKA, as in VAN) can be separated.'
        )
    shares = {}
    for _, gate, convs in _gates(dict(state), found):
        for name, (weight, bias, _) in convs.items():
            key = f'backbone.{gate}.{name}'
            row, column = (f'{key}_{axis}'.replace('conv0_', 'conv0') for axis in 'hv')
            rows, columns, shares[f'{gate}.{name}'] = _separate(weight)
            del state[f'{key}.weight'], state[f'{key}.bias']
            state |= {f'{row}.weight': rows, f'{row}.bias': torch.zeros_like(bias),
                      f'{column}.weight': columns, f'{column}.bias': bias}  # fmt: skip
    return state, shares


def _separate(weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return rows (C, 1, 1, n), columns (C, 1, n, 1), and the energy share of their products."""
    u, s, vh = torch.linalg.svd(weight[:, 0].double())
    rows, columns = vh[:, 0], u[:, :, 0]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    scale = s[:, :1].sqrt().copysign(largest)
    energy = s.square().sum(0)
    share = float(energy[0] / energy.sum()) if energy.any() else 1.0
    rows, columns = (rows * scale)[:, None, None], (columns * scale)[:, None, :, None]
    return rows.to(weight), columns.to(weight), share


@torch.no_grad()
def resize_channels(state_dict: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """Change the number of image channels of weights for 1 or 3.

    For one channel they are summed, so that a gray image gives what it gave as three equal
    channels. For other numbers they are repeated in turn and rescaled by the ratio, as timm
    does: equal channels give the same if one number is a multiple of the other.

    Raises:
        CheckpointError: If these are not the tensors of an LSKA-VAN for 1 or 3 channels.
        ValueError: If ``in_channels`` is less than 1.
    """
    state, description = read_state(state_dict)
    found, key = description['in_channels'], 'backbone.patch_embed1.proj.weight'
    if in_channels < 1:
        raise ValueError(f'in_channels={in_channels} is less than 1.')
    if found not in (1, 3, in_channels):
        raise CheckpointError(
            f'The weights are for images of {found} channels; only those for 1 or 3 can be '
            f'resized, to in_channels={in_channels} or any other number.'
        )
    if in_channels == 1:
        state[key] = state[key].sum(1, keepdim=True)  # (C, found, height, width)
    elif in_channels != found:
        turns = torch.arange(in_channels) % found
        state[key] = state[key][:, turns] * (found / in_channels)
    return state
