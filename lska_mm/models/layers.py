"""What the backbone is made of, as fast as a CPU and a GPU do it.

Each function is what its name says. Eagerly on a CPU, and with maps in channels_last on
an NVIDIA GPU, it takes a faster way to the same result where nobody listens to or has
changed the modules concerned. Graphs that are traced get the plain operators.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from .columns import convolve_columns
from .eager import (
    can_fuse,
    depthwise,
    has_few_pixels,
    has_kernels,
    is_channels_last,
    is_eager_cpu,
    is_product,
    is_untouched,
)

ALL = slice(None)
CACHED = 2**20  # numbers of a map that stay in the cache until they are used: 4 MiB


def can_replace(x: Tensor, *convs: nn.Module) -> bool:
    """Tell whether oneDNN's fused convolutions may stand in for ``convs``."""
    return can_fuse(x) and all(is_untouched(conv, *_CONVOLUTIONS) for conv in convs)


def gelu(x: Tensor) -> Tensor:
    """GELU; oneDNN's is only called for dense memory, which channels_last is as (B, H, W, C)."""
    if not is_eager_cpu(x):
        return F.gelu(x)
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_gelu(conv: Any, x: Tensor) -> Tensor:
    """GELU(conv(x)), in one pass over the map."""
    return _convolve(conv, x, 'gelu') if can_replace(x, conv) else gelu(conv(x))


def conv_add(conv: Any, x: Tensor, summand: Tensor, into: bool = False) -> Tensor:
    """conv(x) + ``summand``, in one pass over the map; ``into`` it, if nobody else has it."""
    if not can_replace(x, conv):
        return conv(x) + summand
    return _convolve_add(conv, x, summand, into=into)


def scaled(conv: Any, x: Tensor, scale: Tensor) -> Tensor:
    """conv(x) times ``scale`` (C,); of the weights where nobody can tell, which keeps no map."""
    if is_untouched(conv, PointwiseConv2d):
        return conv(x, scale)
    return conv(x) * scale[:, None, None]


def conv_of_gelu(conv: Any, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """conv(GELU(x)), times ``scale`` (C,); for the backward pass ``x`` alone is kept."""
    return _ConvOfGELU.apply(x, conv.weight, conv.bias, scale)


def bottleneck(fc1: Any, dwconv: Any, fc2: Any, x: Tensor, into: bool = False) -> Tensor:
    """fc2(GELU(dwconv(fc1(x)))), where `can_replace` allows it; plus and ``into`` ``x``.

    What lies between is several times as wide as ``x``. Where it is large, it
    is computed some channels at a time, which stay in the processor's cache.
    """
    channels, pixels = dwconv.out_channels, x[:, 0].numel()
    width = channels if has_few_pixels(x) else min(channels, max(32, CACHED // pixels // 32 * 32))
    out: Any = None
    for start in range(0, channels, width):
        part = slice(start, start + width) if width < channels else ALL
        hidden = _convolve(dwconv, _convolve(fc1, x, 'none', part), 'gelu', part)
        if out is not None:
            _convolve_add(fc2, hidden, out, part, into=True, with_bias=False)
        elif into:
            out = _convolve_add(fc2, hidden, x, part, into=width == channels)
        else:
            out = _convolve(fc2, hidden, 'none', inputs=part)
    return out


def _arguments(conv: nn.Conv2d, x: Tensor, outputs: slice = ALL, inputs: slice = ALL) -> tuple:
    """What oneDNN wants to know of a convolution, or of some of its channels."""
    if isinstance(conv, PackedConv2d) and outputs is inputs is ALL:
        weight = conv.packed_weight(x)
    else:
        weight = conv.weight[outputs, inputs]
    bias = None if conv.bias is None else conv.bias[outputs]
    groups = 1 if conv.groups == 1 else x.shape[1]
    return weight, bias, conv.padding, conv.stride, conv.dilation, groups


def _convolve(
    conv: nn.Conv2d, x: Tensor, activation: str, outputs: slice = ALL, inputs: slice = ALL
) -> Tensor:
    """A convolution by oneDNN with an activation inside."""
    if isinstance(conv, PointwiseConv2d) and has_few_pixels(x):
        return gelu(conv(x)) if activation == 'gelu' else conv(x)
    arguments = _arguments(conv, x, outputs, inputs)
    return torch.ops.mkldnn._convolution_pointwise(x, *arguments, activation, [], 'none')


def _convolve_add(
    conv: nn.Conv2d, x: Tensor, summand: Tensor, inputs: slice = ALL,
    into: bool = False, with_bias: bool = True,
) -> Tensor:  # fmt: skip
    """A convolution by oneDNN plus ``summand``, in its memory or in new one."""
    if isinstance(conv, PointwiseConv2d) and has_few_pixels(x):
        return summand.add_(conv(x)) if into else conv(x).add_(summand)
    weight, bias, *rest = _arguments(conv, x, inputs=inputs)
    bias = bias if with_bias else None
    more = weight, bias, *rest, 'add', 1.0, None, [], None
    if into:
        return torch.ops.mkldnn._convolution_pointwise_.binary(summand, x, *more)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, summand, *more)


def multiply(x: Tensor, y: Tensor, source: nn.Module) -> Tensor:
    """``x * y``; in the memory of ``x``, which ``source`` made, where nobody else has it."""
    return x.mul_(y) if can_replace(x, source) else x * y


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; what it saves for the backward pass is computed again there."""
    if not torch.is_grad_enabled() or not isinstance(inputs[0], Tensor):  # a tracer's
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution; of few pixels as a product of matrices, where weights stay in order."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Convolve (B, C, H, W), times ``scale`` (C_out,)."""
        return _pointwise(x, *_times(scale, self.weight, self.bias))


def _times(scale: Tensor | None, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias times ``scale``, where no map has to be kept for its gradient."""
    return (weight, bias) if scale is None else (weight * scale[:, None, None, None], bias * scale)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_product(x):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


class _ConvOfGELU(torch.autograd.Function):
    """A 1 x 1 convolution of GELU(x), which the backward pass computes again."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(x, *parameters)
        # detached: autocast would keep what it casts here, without gradients, for others
        weight, bias, scale = (None if p is None else p.detach() for p in parameters)
        return _pointwise(gelu(x), *_times(scale, weight, bias))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, scale = ctx.saved_tensors
        grad = grad.to(x.dtype)  # under autocast that of half precision, whatever x is
        trained, grad_scale, activated = any(ctx.needs_input_grad[1:]), None, gelu(x)
        factor = _times(scale, weight, bias)[0].to(x.dtype)
        if is_product(x):
            flat = grad.permute(0, 2, 3, 1)
            above = (flat @ factor.flatten(1)).permute(0, 3, 1, 2)
            grad_weight = grad_bias = None
            if trained:
                rows = flat.flatten(0, 2)
                grad_weight = rows.t() @ activated.permute(0, 2, 3, 1).flatten(0, 2)
                grad_weight, grad_bias = grad_weight.view_as(weight), rows.sum(0)
        else:
            above, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, activated, factor, [len(weight)], (1, 1), (0, 0), (1, 1), False, (0, 0), 1,
                (True, trained, trained),
            )  # fmt: skip
        if scale is not None and trained:
            grad_scale = (grad_weight * weight).sum((1, 2, 3)) + grad_bias * bias
            grad_weight, grad_bias = _times(scale, grad_weight, grad_bias)
        above, x = (t.permute(0, 2, 3, 1) for t in (above, x))  # dense memory, see `gelu`
        grad_x = torch.ops.aten.gelu_backward(above, x).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_bias, grad_scale


class PackedConv2d(nn.Conv2d):
    """A convolution for inference that also keeps its weights in oneDNN's own order.

    Without it oneDNN brings them there in every call, which for small maps
    takes as long as the convolution. They are packed again after a change
    that PyTorch counts, as by ``load_state_dict``; not after one through ``.data``.
    """

    _packed: tuple | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> 'PackedConv2d':
        """The same convolution, with the same parameters."""
        packed = cls.__new__(cls)
        packed.__dict__.update(conv.__dict__)
        return packed

    def packed_weight(self, x: Tensor) -> Tensor:
        """The weights in the order that suits maps of about the size of ``x``."""
        weight = self.weight
        key = (
            weight.data_ptr(), None if weight.is_inference() else weight._version,
            x[:, 0].numel().bit_length(),  # in the order for others it is up to twice as slow
        )  # fmt: skip
        if self._packed is None or self._packed[0] != key:
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                weight.detach().to_mkldnn(), self.padding, self.stride, self.dilation,
                self.groups, list(x.shape),
            )  # fmt: skip
            self._packed = (key, packed)
        return self._packed[1]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        if can_fuse(x):
            return _convolve(self, x, 'none')
        if self.kernel_size == (1, 1):
            return _pointwise(x, self.weight, self.bias)
        return super().forward(x)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != '_packed'}


class DepthwiseConv2d(nn.Conv2d):
    """A depth-wise convolution that keeps height and width; odd kernels.

    1-D kernels are computed as columns. In channels_last, B maps of H x W are in
    memory what B * H maps of W x 1 are; seen so, which copies nothing, a row is
    a column. oneDNN takes slow paths for rows: for their gradients, and where
    they are dilated.
    """

    def __init__(self, channels: int, kernel: tuple[int, int], dilation: int = 1):
        height, width = kernel
        padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
        super().__init__(
            channels, channels, kernel, padding=padding, dilation=dilation, groups=channels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        height, width = self.kernel_size
        dilation = self.dilation[0]
        if self._has_kernel(x):
            return depthwise.convolve(x, self.weight, self.bias, dilation)
        if not is_eager_cpu(x) or min(height, width) > 1:
            return super().forward(x)
        if width == 1:
            return convolve_columns(x, self.weight, self.bias, dilation)
        if dilation == 1 and not torch.is_grad_enabled():
            return super().forward(x)
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b * h, w, 1, c).permute(0, 3, 1, 2)
        rows = convolve_columns(rows, self.weight.transpose(2, 3), self.bias, dilation)
        return rows.permute(0, 2, 3, 1).reshape(b, h, w, c).permute(0, 3, 1, 2)

    def _has_kernel(self, x: Tensor) -> bool:
        """Tell whether a GPU's kernel is for ``x`` and the weights."""
        weight = self.weight
        return (
            is_channels_last(x)
            and has_kernels(x)
            and x.shape[1:2] == weight.shape[:1]
            and x.device == weight.device
            and (x.dtype == weight.dtype or torch.is_autocast_enabled())
            and math.prod(self.kernel_size) <= depthwise.MOST_TAPS
            and self.bias is not None
        )


_CONVOLUTIONS = (PointwiseConv2d, DepthwiseConv2d, PackedConv2d)


def norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` over the channels of (B, C, H, W), wherever it wants them."""
    if type(norm) is not nn.LayerNorm:
        return norm(x)
    out = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return out if is_channels_last(x) else out.contiguous()
