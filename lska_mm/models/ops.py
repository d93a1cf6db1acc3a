"""What the backbone is made of, as fast as a CPU does it.

Each function is what its name says; where it runs eagerly on a CPU, it takes a
faster way to the same result. Graphs that are traced or compiled, and other
devices, get the plain operators.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

if hasattr(torch.compiler, 'is_compiling'):
    from torch.compiler import is_compiling
else:  # torch 2.1
    from torch._dynamo import is_compiling


def is_eager_cpu(x: Tensor) -> bool:
    """Whether oneDNN computes now what is called now."""
    return x.is_cpu and not (torch.jit.is_tracing() or is_compiling())


def _can_fuse(x: Tensor) -> bool:
    """Whether oneDNN's fused convolutions apply: they have no gradient."""
    return (
        is_eager_cpu(x)
        and not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and not torch.is_autocast_cpu_enabled()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def gelu(x: Tensor) -> Tensor:
    """GELU; oneDNN's is only called for dense memory, which channels_last is as (B, H, W, C)."""
    if not is_eager_cpu(x):
        return F.gelu(x)
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_gelu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """GELU(conv(x)), in one pass over the map."""
    if not _can_fuse(x):
        return gelu(conv(x))
    return torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups,
        'gelu', [], 'none',
    )  # fmt: skip


def conv1x1_add(conv: nn.Conv2d, x: Tensor, shortcut: Tensor) -> Tensor:
    """conv(x) + ``shortcut``, in one pass over the map."""
    if not _can_fuse(x):
        return conv(x) + shortcut
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, shortcut, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation,
        conv.groups, 'add', 1.0, None, [], None,
    )  # fmt: skip


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """``x * y``; without gradients in the memory of ``x``, which must be a temporary."""
    return x * y if torch.is_grad_enabled() or not is_eager_cpu(x) else x.mul_(y)


def recompute(function: Callable[..., Tensor], *inputs: Tensor, random: bool) -> Tensor:
    """``function(*inputs)``; what it saves for the backward pass is computed again there.

    ``random`` functions draw the same numbers again.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)


class DilatedRowConv2d(nn.Conv2d):
    """A 1 x n convolution, computed as n x 1.

    In channels_last, B maps of H x W are in memory what B * H maps of W x 1
    are. Seen so, which copies nothing, the kernel is vertical; with dilation,
    oneDNN takes a slow path for horizontal ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        if not is_eager_cpu(x):
            return super().forward(x)
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, 1, channels)
        rows = F.conv2d(
            rows.permute(0, 3, 1, 2),
            self.weight.transpose(2, 3),
            self.bias,
            padding=self.padding[::-1],
            dilation=self.dilation[::-1],
            groups=self.groups,
        )
        return rows.permute(0, 2, 3, 1).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def depthwise_conv(channels: int, kernel: tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """A depth-wise convolution that keeps height and width; odd kernels."""
    height, width = kernel
    padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
    conv = DilatedRowConv2d if height == 1 and dilation > 1 else nn.Conv2d
    return conv(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels)
