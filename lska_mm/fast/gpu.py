"""For an NVIDIA GPU: depth-wise convolutions in Triton, for maps in channels_last."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from . import gradients
from .gradients import linear
from .way import Way

kernels: Any = None  # if there is a GPU, and Triton
if torch.version.cuda and hasattr(torch, 'get_autocast_dtype') and torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from . import kernels  # type: ignore[no-redef]

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def prefers_channels_last(x: Tensor, backbone: nn.Module) -> bool:
    """Tell whether a backbone is faster with maps in channels_last."""
    return has_kernels(x) and x.numel() >= large(x.get_device()) and not wants_nchw(backbone)


def find(kind: str, x: Tensor) -> Callable[[Any, Tensor], Tensor] | None:
    """Return a function of a module of ``kind`` and a map that keeps the map's layout; or None."""
    if in_channels_last(x) and has_kernels(x):
        return getattr(_WITH_KERNELS, kind)
    return _OF_NCHW.mlp if kind == 'mlp' and torch.is_grad_enabled() else None


def in_channels_last(x: Tensor) -> bool:
    """Tell whether a map is in channels_last, and not contiguous as well."""
    return not x.is_contiguous() and x.stride(1) == 1


def has_kernels(x: Tensor) -> bool:
    """Tell whether there are kernels for a map."""
    return kernels is not None and x.dtype in TYPES and kernels.works(x.get_device())


def wants_nchw(backbone: nn.Module) -> bool:
    """Tell whether a part of a backbone is slower in channels_last, or assumes NCHW."""
    return any(
        module.groups > 1 and not has_kernel(module)
        if isinstance(module, nn.Conv2d)
        else type(module).__module__.startswith('mmcv.ops')  # SyncBN's too
        for module in backbone.modules()
    )


def has_kernel(conv: nn.Conv2d) -> bool:
    """Tell whether there is a kernel for a depth-wise convolution."""
    return math.prod(conv.kernel_size) <= kernels.MOST_TAPS


@functools.cache
def large(gpu: int) -> int:
    """Return the number of values in a batch from which on the GPU is the bottleneck.

    The kernels take less time on the GPU, and more on the host. 2^24 is right for a host
    that needs 27 us per launch (docs/results/h200_df6cacc.md).
    """
    if 'LSKA_KERNELS_FROM' in os.environ:
        return int(os.environ['LSKA_KERNELS_FROM'])
    x = torch.zeros(1, device=f'cuda:{gpu}')
    launch = min(_seconds(x) for _ in range(5))
    exponent = min(24, max(20, round(24 + math.log2(launch / 27e-6))))
    print_log(
        f'LSKA-VAN uses its own kernels on GPU {gpu} for batches of 2^{exponent} values or more, '
        f'as the host needs {launch * 1e6:.0f} us per launch (LSKA_KERNELS_FROM sets the number).',
        'current',
    )
    return 2**exponent


def _seconds(x: Tensor) -> float:
    """Return the host's time to launch an operator, averaged over a hundred."""
    start = time.perf_counter()
    for _ in range(100):
        x.add_(1)
    return (time.perf_counter() - start) / 100


# --- Ways -------------------------------------------------------------------------------


class _WithKernels(Way):
    """Depth-wise convolutions in Triton, and the gradients of `gradients`."""

    def depthwise(self, conv: Any, x: Tensor) -> Tensor:
        if has_kernel(conv):
            return kernels.convolve(x, conv.weight, conv.bias, conv.dilation[0])
        return conv(x)

    def conv1x1(self, conv: Any, x: Tensor) -> Tensor:
        if _is_product(x):
            return linear(x, conv.weight, conv.bias)
        return gradients.conv1x1(conv, x)

    def conv_of_gelu(self, conv: Any, x: Tensor) -> Tensor:
        return gradients.conv_of_gelu(conv, x, _is_product(x))


class _OfNCHW(Way):
    conv_of_gelu = staticmethod(gradients.conv_of_gelu)


def _is_product(x: Tensor) -> bool:
    """Tell whether a matrix product is faster; in float32 only convolutions use TF32."""
    return x.dtype != torch.float32 or torch.is_autocast_enabled()


_WITH_KERNELS, _OF_NCHW = _WithKernels(), _OfNCHW()
