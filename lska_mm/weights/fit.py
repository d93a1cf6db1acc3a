"""The dilated pair of 1-D kernels that is nearest to a dense one, by least squares."""

import torch
from torch import Tensor


def factorize(target: Tensor, local: int, far: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the pair whose dense kernel differs least from ``target``.

    By alternating least squares: with one part fixed, the dense kernel is linear in the
    other. It ends in local minima, so that the best of several starts counts: the singular
    vectors of a matrix (local, far) in which each pixel is shared equally among the products
    of taps that lie on it.

    Args:
        target: Dense kernels (C, local + dilation * (far - 1)).
        local: Taps of the part without dilation.
        far: Taps of the other part.
        dilation: Pixels between those.

    Returns:
        The local part (C, local), each channel of norm 1 or 0, and the far part (C, far).
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
    """The taps (..., n) that come with the ``fixed`` ones nearest to ``target`` (..., K)."""
    matrix = target.new_zeros(*target.shape, taps.numel())
    matrix[..., pixels, taps] = fixed
    ridge = 1e-12 * torch.eye(taps.numel(), dtype=target.dtype)  # for channels of zeros
    return torch.linalg.solve(matrix.mT @ matrix + ridge, matrix.mT @ target[..., None])[..., 0]
