"""The nearest gate of another kernel size, by least squares."""

import torch
from torch import Tensor

from .gate import Conv, center, dense_kernel, size_of
from .names import CheckpointError


def _response_to_zeros(convs: list[Conv]) -> Tensor:
    """What a map of zeros becomes far from the border, (C,)."""
    response = torch.zeros_like(convs[0].bias, dtype=torch.float64)
    for conv in convs:
        response = response * conv.weight.double().sum((1, 2, 3)) + conv.bias.double()
    return response


def fit_gate(old: list[Conv], new: list[Conv], attention: str) -> list[Conv]:
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


def _fit_axis(old: list[Conv], new: list[Conv]) -> list[Conv]:
    """The nearest local and far part along one axis."""
    target = dense_kernel(old)[0].flatten(1)  # (C, K)
    target = center(target[:, None], (1, size_of(new)))[:, 0]
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
    """Return the taps (C, local) and (C, far) whose dense kernel is nearest to ``target``.

    ``target`` is (C, K), each channel of norm 1 or 0. By alternating least squares: with
    one part fixed, the dense kernel is linear in the other. It ends in local minima, so
    that the best of several starts counts: the singular vectors of a matrix (local, far)
    in which each pixel is shared equally among the products of taps that lie on it.
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
