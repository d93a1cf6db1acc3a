"""Convolutions with custom gradients, for maps in channels_last."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def gelu(x: Tensor) -> Tensor:
    """GELU as (B, H, W, C): PyTorch only calls oneDNN's for contiguous tensors."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1 x 1 convolution as a matrix product."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution."""
    return F.conv2d(x, _InOwnStrides.apply(conv.weight), conv.bias)


def conv_of_gelu(conv: nn.Conv2d, x: Tensor, as_product: bool = False) -> Tensor:
    """A 1 x 1 convolution of GELU(x); only ``x`` is kept for the backward pass."""
    return _ConvOfGELU.apply(x, _InOwnStrides.apply(conv.weight), conv.bias, as_product)


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A depth-wise convolution, on a CPU.

    1 x n kernels are computed as n x 1: in channels_last, B maps of H x W have the same memory
    as B * H maps of W x 1, so a view turns rows into columns. oneDNN is slow for rows.
    """
    weight, bias, dilation = _InOwnStrides.apply(conv.weight), conv.bias, conv.dilation[0]
    height, width = weight.shape[2:]
    if min(height, width) > 1:
        return F.conv2d(x, weight, bias, 1, conv.padding, dilation, conv.groups)
    if height > 1:
        return columns(x, weight, bias, dilation)
    return as_rows(columns(as_columns(x), weight.transpose(2, 3), bias, dilation), x)


def columns(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """A depth-wise n x 1 convolution."""
    if dilation > 1:
        return _DilatedColumns.apply(x, weight, bias, dilation)
    return _columns(x, weight, bias, dilation)


def as_columns(x: Tensor) -> Tensor:
    """B maps of H x W, in channels_last, as B * H maps of W x 1."""
    b, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(b * h, w, 1, c).permute(0, 3, 1, 2)


def as_rows(columns: Tensor, x: Tensor) -> Tensor:
    """Undo `as_columns`, with the shape of ``x``."""
    b, c, h, w = x.shape
    return columns.permute(0, 2, 3, 1).reshape(b, h, w, c).permute(0, 3, 1, 2)


class _InOwnStrides(torch.autograd.Function):
    """A weight whose gradient has its strides, as DistributedDataParallel expects.

    Those of convolutions in channels_last differ in dimensions of size 1.
    """

    @staticmethod
    def forward(ctx, weight):
        ctx.strides = weight.stride()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        same = all(n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), ctx.strides))
        return grad.as_strided(grad.shape, ctx.strides) if same else grad


class _ConvOfGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, as_product):
        ctx.save_for_backward(x, weight)
        ctx.as_product = as_product
        # detached: autocast would keep what it casts here, without gradients, for others
        return (linear if as_product else F.conv2d)(gelu(x), weight.detach(), bias.detach())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)  # under autocast that of half precision, whatever x is
        trained, activated, factor = any(ctx.needs_input_grad[1:]), gelu(x), weight.to(x.dtype)
        grad_weight = grad_bias = None
        if ctx.as_product:
            flat = grad.permute(0, 2, 3, 1)
            above = (flat @ factor.flatten(1)).permute(0, 3, 1, 2)
            if trained:
                rows = flat.flatten(0, 2)
                grad_weight = rows.t() @ activated.permute(0, 2, 3, 1).flatten(0, 2)
                grad_weight, grad_bias = grad_weight.view_as(weight), rows.sum(0)
        else:
            above, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, activated, factor, [len(weight)], (1, 1), (0, 0), (1, 1), False, (0, 0), 1,
                (True, trained, trained),
            )  # fmt: skip
        above, x = (t.permute(0, 2, 3, 1) for t in (above, x))  # dense memory, see `gelu`
        grad_x = torch.ops.aten.gelu_backward(above, x).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_bias, None


class _DilatedColumns(torch.autograd.Function):
    """Dilated columns; oneDNN's gradients are several times slower than the convolution.

    The gradient of the input is a convolution with the flipped kernel. For that of
    the weights, each ``dilation`` rows of a map are viewed as one wide row, in which
    the taps are adjacent; nothing is copied unless rows have to be padded.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _columns(x, weight, bias, dilation)

    @staticmethod
    @torch.autocast('cpu', enabled=False)  # as in the forward pass
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        channels, _, size, _ = weight.shape
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _columns(grad, weight.flip(2), None, ctx.dilation)
        mask = [False, *ctx.needs_input_grad[1:3]]
        if any(mask):
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                _widen(grad, ctx.dilation), _widen(x, ctx.dilation), weight, [channels],
                (1, 1), (size // 2, 0), (1, 1), False, (0, 0), channels, mask,
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = (dilation * (weight.shape[2] // 2), 0)
    return F.conv2d(x, weight, bias, 1, padding, (dilation, 1), x.shape[1])


def _widen(x: Tensor, rows: int) -> Tensor:
    """View maps (B, C, H, W) as (B, C, H / rows, rows * W), padded with rows of zeros."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    if height % rows:
        x = F.pad(x, (0, 0, 0, 0, 0, -height % rows))
    return x.reshape(batch, -1, rows * width, channels).permute(0, 3, 1, 2)
