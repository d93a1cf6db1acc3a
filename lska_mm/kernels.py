"""Attention kernels of another size, and 2-D ones made 1-D.

The depth-wise convolutions of a gate are together one dense kernel for each
channel, of which their weights are the factors (see `lska_mm.models.lska`).
Sizes with the same dilation have the same local part, so that zeros at both
ends of the far part make of one size a larger one that is the same function.
What cannot be the same is fitted by least squares.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .checkpoint import CheckpointError, convert_state_dict, describe
from .loader import get_state_dict
from .models import LSKAVAN
from .models.lska import kernel_layout

_GATE = re.compile(r'(backbone\.block(\d+)\.\d+\.attn\.spatial_gating_unit\.)conv0h?\.weight')
_STAGE = re.compile(r'backbone\.(?:patch_embed|block|norm)(\d+)\..+')
_DENSE = re.compile(r'(backbone\.block.+\.spatial_gating_unit)\.(conv0|conv_spatial)\.(\w+)')
_PAIRS = dict(conv0=('conv0h', 'conv0v'), conv_spatial=('conv_spatial_h', 'conv_spatial_v'))

Layout = dict[str, tuple[tuple[int, int], int]]  # what `kernel_layout` returns


def _read(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors under this package's names, and what they are."""
    state = convert_state_dict(state_dict)
    description = describe(state)
    if description is None:
        raise CheckpointError(
            f'No LSKA-VAN among the {len(state)} tensors '
            f'(first: {", ".join(list(state)[:3]) or "none"}).'
        )
    return state, description


# --- Another size ------------------------------------------------------------------


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
        state_dict: Of a backbone, or a model that has one, in any of the layouts
            of `lska_mm.checkpoint`.
        kernel_size: Of `LSKAVAN`: one for all stages, or a value a stage.
        nearest: Where a gate of that size cannot be the same, take the one whose
            dense kernels differ least from the old ones in the sum of squares.
            The response to a map of zeros, which the biases make, is kept except
            near the border.

    Returns:
        The tensors, under the names of this package's classifiers, and for each
        gate that had to be fitted, by name, the error of each channel (C,): the
        Frobenius norm of the difference of the dense kernels, relative to the old.

    Raises:
        CheckpointError: If these are not the tensors of an LSKA-VAN; if the
            function would change and ``nearest`` is False; if 2-D kernels with
            dilation (``attention='LKA'``) would have to be fitted.
        ValueError: If the size is invalid; names the nearest valid ones.
    """
    state, description = _read(state_dict)
    attention, stages = description['attention'], len(description['arch']['depths'])
    sizes = [kernel_size] * stages if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != stages:
        raise ValueError(f'kernel_size={sizes}: one for all {stages} stages, or one a stage.')
    layouts = [kernel_layout(attention, size) for size in sizes]
    errors = {}
    for match in filter(None, map(_GATE.fullmatch, list(state))):
        prefix, layout = match[1], layouts[int(match[2]) - 1]
        gate = prefix.removeprefix('backbone.').rstrip('.')
        old = _read_gate(state, prefix, layout)
        new = [conv.centred(*shape) for conv, shape in zip(old, layout.values())]
        reason = _why_different(old, new)
        if reason:
            if not nearest:
                raise CheckpointError(
                    f'{gate}: {reason}, so that it cannot be the same function. '
                    'nearest=True (--nearest) takes the nearest kernels instead.'
                )
            new = _fit_gate(old, new, attention)
            errors[gate] = _difference(old, new)
        for name, conv in zip(layout, new):
            state[f'{prefix}{name}.weight'], state[f'{prefix}{name}.bias'] = conv[:2]
    return state, errors


class _Conv(NamedTuple):
    """One of the depth-wise convolutions of a gate."""

    weight: Tensor  # (C, 1, height, width), both odd
    bias: Tensor  # (C,)
    dilation: int

    def centred(self, shape: Sequence[int], dilation: int) -> '_Conv':
        """With zeros around the kernel, or without its outer taps."""
        return _Conv(_centre(self.weight, shape), self.bias, dilation)


def _centre(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad or crop (..., H, W) to ``shape``, the same on opposite sides."""
    rows, columns = ((new - old) // 2 for new, old in zip(shape, x.shape[-2:]))
    return F.pad(x, [columns, columns, rows, rows])


def _read_gate(state: Mapping[str, Any], prefix: str, layout: Layout) -> list[_Conv]:
    """The convolutions of a gate, in the order they are applied."""
    keys = [f'{prefix}{name}.{kind}' for name in layout for kind in ('weight', 'bias')]
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f'{missing[0]} is missing.')
    tensors = [state[key] for key in keys]
    dilation = (tensors[0].shape[-1] + 1) // 2  # the local part is 2 * dilation - 1 long
    return [
        _Conv(weight, bias, dilation if 'spatial' in name else 1)
        for name, weight, bias in zip(layout, tensors[::2], tensors[1::2])
    ]


def _why_different(old: list[_Conv], new: list[_Conv]) -> str | None:
    """What keeps kernels that were padded or cropped from being the same, in words."""
    size, new_size = _size(old), _size(new)
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
    return int((weight != _centre(_centre(weight, shape), weight.shape[-2:])).sum())


def _size(convs: Sequence[_Conv]) -> int:
    """The longer side of the dense kernel."""
    height, width = (
        1 + sum(conv.dilation * (conv.weight.shape[axis] - 1) for conv in convs) for axis in (2, 3)
    )
    return max(height, width)


def _dense(convs: Sequence[_Conv]) -> Tensor:
    """The dense kernel that convolutions are together, (1, C, H, W)."""
    kernel = convs[0].weight.double().transpose(0, 1)
    for conv in convs[1:]:
        kernel = F.conv_transpose2d(
            kernel, conv.weight.double(), groups=len(conv.weight), dilation=conv.dilation
        )
    return kernel


def _difference(old: list[_Conv], new: list[_Conv]) -> Tensor:
    """The relative error of each channel's dense kernel, (C,)."""
    kernels = [_dense(old), _dense(new)]
    side = max(kernel.shape[-1] for kernel in kernels)
    ours, theirs = (_centre(kernel[0], (side, side)).flatten(1) for kernel in kernels)
    return (theirs - ours).norm(dim=1) / ours.norm(dim=1).clamp_min(1e-300)


def _response_to_zeros(convs: list[_Conv]) -> Tensor:
    """What a map of zeros becomes far from the border, (C,)."""
    response = torch.zeros_like(convs[0].bias, dtype=torch.float64)
    for conv in convs:
        response = response * conv.weight.double().sum((1, 2, 3)) + conv.bias.double()
    return response


def _fit_gate(old: list[_Conv], new: list[_Conv], attention: str) -> list[_Conv]:
    """The gate with kernels of the shapes of ``new`` that is nearest to ``old``.

    Kernels in one step are nearest when cropped, which ``new`` is. For
    separable ones, the nearest of each axis are the nearest of both.
    """
    if attention == 'LKA':
        raise CheckpointError(
            'Dilated 2-D kernels (attention LKA) have no nearest fit here; make them 1-D first, '
            'with tools/model_converters/van2lska.py.'
        )
    if attention == 'LSKA':
        for axis in (0, 1):  # horizontal, vertical: every other convolution
            new[axis::2] = _fit_axis(old[axis::2], new[axis::2])
    last = new[-1]
    bias = last.bias + _response_to_zeros(old) - _response_to_zeros(new)
    return [*new[:-1], last._replace(bias=bias.to(last.bias))]


def _fit_axis(old: list[_Conv], new: list[_Conv]) -> list[_Conv]:
    """The nearest local and far part along one axis."""
    target = _dense(old)[0].flatten(1)  # (C, K)
    target = _centre(target[:, None], (1, _size(new)))[:, 0]
    norm = target.norm(dim=1, keepdim=True).clamp_min(1e-300)
    lengths = [conv.weight[0].numel() for conv in new]
    local, far = _factorize(target / norm, lengths[0], lengths[1], new[1].dilation)
    # The scale is shared between the two as before, for the sake of the bias between
    # them: the local part keeps its norm and the sign of its sum.
    before = old[0].weight.double().flatten(1)
    scale = before.norm(dim=1, keepdim=True).clamp_min(1e-30)
    turned = local.sum(1, keepdim=True) * before.sum(1, keepdim=True) < 0
    scale = torch.where(turned, -scale, scale)
    return [
        conv._replace(weight=taps.reshape(conv.weight.shape).to(conv.weight))
        for conv, taps in zip(new, (local * scale, far * norm / scale))
    ]


def _factorize(
    target: Tensor, local: int, far: int, dilation: int, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """The taps (C, local) and (C, far) whose dense kernel is nearest to ``target``.

    ``target`` is (C, K), each channel of norm 1 or 0.

    By alternating least squares: with the one part fixed, the dense kernel is
    linear in the other. It ends in local minima, so that the best of several
    starts counts. They are the singular vectors of a matrix (local, far), in
    which each pixel of the target is shared equally among the products of taps
    that lie on it.
    """
    i, j = torch.arange(local)[:, None], torch.arange(far)
    pixels = i + dilation * j  # on which the product of two taps lies, (local, far)
    shares = (target / torch.bincount(pixels.flatten()))[:, pixels]
    right = torch.linalg.svd(shares, full_matrices=False).Vh.transpose(0, 1)  # (starts, C, far)
    target = target.expand(len(right), -1, -1)
    for _ in range(iterations):
        left = _solve(right[..., None, :], pixels, i, target)
        left = left / left.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        right = _solve(left[..., None], pixels, j, target)
    products = (left[..., None] * right[..., None, :]).flatten(2)
    dense = torch.zeros_like(target).index_add(2, pixels.flatten(), products)
    best = (dense - target).norm(dim=-1).argmin(0), torch.arange(target.shape[1])
    return left[best], right[best]


def _solve(fixed: Tensor, pixels: Tensor, taps: Tensor, target: Tensor) -> Tensor:
    """The taps (..., n) that come with the ``fixed`` ones nearest to ``target`` (..., K)."""
    matrix = target.new_zeros(*target.shape, taps.numel())
    matrix[..., pixels, taps] = fixed
    ridge = 1e-12 * torch.eye(taps.numel(), dtype=target.dtype)  # for channels of zeros
    return torch.linalg.solve(matrix.mT @ matrix + ridge, matrix.mT @ target[..., None])[..., 0]


# --- From 2-D to 1-D kernels -------------------------------------------------------


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
            or a model that has one, in any of the layouts of
            `lska_mm.checkpoint`.

    Returns:
        The tensors for ``'LSKA'`` or ``'LSKA-trivial'``, under the names of this
        package's classifiers, and for each 2-D convolution, by name, the share
        of its energy (sum of squares over all channels) that is kept.

    Raises:
        CheckpointError: If these are not the tensors of such a network.
    """
    state, description = _read(state_dict)
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


# --- In a config -------------------------------------------------------------------


@WEIGHT_INITIALIZERS.register_module()
class ResizedPretrained:
    """Start an `LSKAVAN` from weights of another kernel size.

    In a config, where ``Pretrained`` would refuse the file:

        backbone=dict(kernel_size=53, init_cfg=dict(
            type='ResizedPretrained', checkpoint='pretrained/lska-van-tiny_k23_in1k.pth'))

    Args:
        checkpoint: File or URL of the weights, in any layout.
        nearest: Take the nearest kernels where they cannot be the same function,
            see `resize_kernels`.

    Raises:
        CheckpointError: See `resize_kernels`; if the weights differ from the
            backbone in more than the kernel size.
        TypeError: If it is the ``init_cfg`` of another module than an `LSKAVAN`.
    """

    def __init__(self, checkpoint: str, nearest: bool = False):
        self.checkpoint = checkpoint
        self.nearest = nearest

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into ``module``."""
        if not isinstance(module, LSKAVAN):
            raise TypeError(
                'ResizedPretrained is for the init_cfg of an LSKAVAN backbone, not of '
                f'{type(module).__name__}.'
            )
        checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, 'cpu', logger='current')
        state = {
            key: value
            for key, value in convert_state_dict(get_state_dict(checkpoint)).items()
            if (stage := _STAGE.fullmatch(key)) and int(stage[1]) <= module.num_stages
        }
        ours, theirs = describe(module.state_dict()), describe(state)
        if ours and theirs and {**theirs, 'kernel_size': ours['kernel_size']} == ours:
            state, errors = resize_kernels(state, ours['kernel_size'], self.nearest)
            print_log(
                f'{self.checkpoint}: attention kernels of size {theirs["kernel_size"]} resized to '
                f'{ours["kernel_size"]}, {summarize_errors(errors)}',
                logger='current',
            )
        module.load_state_dict(state)  # says what else differs
        if hasattr(module, '_params_init_info'):  # MMEngine's record of who set what
            update_init_info(module, f'ResizedPretrained: load from {self.checkpoint}')


def summarize_errors(errors: Mapping[str, Tensor]) -> str:
    """Say in words how well `resize_kernels` did."""
    if not errors:
        return 'the same function'
    values = torch.cat(list(errors.values()))
    return (
        f'not the same function: dense kernels differ by up to {values.max():.3g}, on average '
        f'{values.mean():.3g} of their norm'
    )
