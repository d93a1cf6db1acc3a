"""Depth-wise n x 1 convolutions on a CPU, with gradients as fast as themselves."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .eager import is_autocast


def convolve_columns(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """A depth-wise n x 1 convolution of (B, C, H, W)."""
    if dilation > 1 and torch.is_grad_enabled() and not is_autocast():
        return _DilatedColumns.apply(x, weight, bias, dilation)
    padding = (dilation * (weight.shape[2] // 2), 0)
    return F.conv2d(x, weight, bias, 1, padding, (dilation, 1), x.shape[1])


class _DilatedColumns(torch.autograd.Function):
    """The same with gradients as fast as itself; oneDNN's are several times slower.

    The input's gradient is a convolution with the kernel turned round. For the
    weights', ``dilation`` rows of a map are seen as one row so many times as
    wide, where the taps are neighbors: again nothing is copied, but the rows
    that are missing at the end.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return convolve_columns(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        channels, _, size, _ = weight.shape
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve_columns(grad, weight.flip(2), None, ctx.dilation)
        mask = [False, *ctx.needs_input_grad[1:3]]
        if any(mask):
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                _widen(grad, ctx.dilation), _widen(x, ctx.dilation), weight, [channels],
                (1, 1), (size // 2, 0), (1, 1), False, (0, 0), channels, mask,
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None


def _widen(x: Tensor, rows: int) -> Tensor:
    """Maps (B, C, H, W) as (B, C, H / rows, rows * W), with rows of zeros to fill the last."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    if height % rows:
        x = F.pad(x, (0, 0, 0, 0, 0, -height % rows))
    return x.reshape(batch, -1, rows * width, channels).permute(0, 3, 1, 2)
