"""For `torch.compile` on an NVIDIA GPU: depth-wise convolutions in Triton.

The compiler fuses the rest. Exported graphs only have PyTorch's operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import gpu
from .way import Way

# Torch 2.6 and later have Triton operators, and distinguish compiling from exporting.
_TELLS = hasattr(torch.library, 'triton_op') and hasattr(torch.compiler, '_is_exporting_flag')


def runs_here() -> bool:
    """Tell whether the graph will run in this process, and is not exported."""
    return _TELLS and not torch.compiler._is_exporting_flag


def prefers_channels_last(x: Tensor, backbone: nn.Module) -> bool:
    """Tell whether a backbone is faster with maps in channels_last."""
    return gpu.has_kernels(x) and not gpu.wants_nchw(backbone)


def find(kind: str, x: Tensor) -> Callable[[Any, Tensor], Tensor] | None:
    """Return a function of a module of ``kind`` and a map that keeps the map's layout; or None."""
    return getattr(_WAY, kind) if gpu.in_channels_last(x) and gpu.has_kernels(x) else None


class _Compiled(Way):
    def depthwise(self, conv: Any, x: Tensor) -> Tensor:
        if gpu.has_kernel(conv):
            return gpu.kernels.convolve_in_graph(x, conv.weight, conv.bias, conv.dilation[0])
        return conv(x)


_WAY = _Compiled()
