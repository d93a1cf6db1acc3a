"""On an NVIDIA GPU: depth-wise convolutions in Triton, for maps in channels_last."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .gradients import conv1x1, conv_of_gelu, gelu, linear

kernels: Any = None  # if there is a GPU, and Triton
if torch.version.cuda and hasattr(torch, 'get_autocast_dtype') and torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from . import kernels  # type: ignore[no-redef]

LARGE = 2**24  # numbers of images from which a GPU computes for longer than its host launches
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights_like(x: Tensor) -> tuple:
    """Return the device and the types that weights must have."""
    return x.is_cpu, x.get_device(), TYPES if torch.is_autocast_enabled() else (x.dtype,)


def prefers_channels_last(x: Tensor, backbone: nn.Module) -> bool:
    """Tell whether a backbone is faster for maps that are in memory as (B, H, W, C)."""
    return x.numel() >= LARGE and _has_kernels(x) and not any(map(_wants_nchw, backbone.modules()))


def find(kind: str, x: Tensor) -> Callable[[Any, Tensor], Tensor] | None:
    """Return the function of a module of ``kind`` and a map, which returns the map's layout."""
    if not x.is_contiguous() and x.stride(1) == 1 and _has_kernels(x):
        return _WITH_KERNELS[kind]
    return _mlp_of_nchw if kind == 'mlp' and torch.is_grad_enabled() else None


def _has_kernels(x: Tensor) -> bool:
    return kernels is not None and x.dtype in TYPES and kernels.works(x.get_device())


def _wants_nchw(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):  # depth-wise ones of PyTorch are slower in channels_last
        return module.groups > 1 and math.prod(module.kernel_size) > kernels.MOST_TAPS
    return type(module).__module__.startswith('mmcv.ops')  # SyncBN's too takes any map for NCHW


def _mlp_of_nchw(branch: Any, x: Tensor) -> Tensor:
    return conv_of_gelu(branch.fc2, branch.dwconv(branch.fc1(x)))


def _gate(gate: Any, x: Tensor) -> Tensor:
    *convs, last = gate
    out = x
    for conv in convs:
        out = _depthwise(conv, out)
    return x * _conv1x1(last, out)


def _gated(branch: Any, x: Tensor) -> Tensor:
    """All but the last convolution of `_attention`."""
    return _gate(branch.spatial_gating_unit, gelu(_conv1x1(branch.proj_1, x)))


def _attention(branch: Any, x: Tensor) -> Tensor:
    return x + _conv1x1(branch.proj_2, _gated(branch, x))


def _mlp(branch: Any, x: Tensor) -> Tensor:
    hidden = _depthwise(branch.dwconv, _conv1x1(branch.fc1, x))
    if torch.is_grad_enabled():
        return conv_of_gelu(branch.fc2, hidden, _is_product(hidden))
    return _conv1x1(branch.fc2, gelu(hidden))


def _deployed(block: Any, x: Tensor) -> Tensor:
    x = x * block.shortcut + _conv1x1(block.attn.proj_2, _gated(block.attn, x))
    return x + _mlp(block.mlp, x)


_WITH_KERNELS = dict(gate=_gate, attention=_attention, mlp=_mlp, deployed=_deployed)


def _depthwise(conv: Any, x: Tensor) -> Tensor:
    if math.prod(conv.kernel_size) <= kernels.MOST_TAPS:
        return kernels.convolve(x, conv.weight, conv.bias, conv.dilation[0])
    return F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, conv.groups)


def _conv1x1(conv: Any, x: Tensor) -> Tensor:
    return linear(x, conv.weight, conv.bias) if _is_product(x) else conv1x1(conv, x)


def _is_product(x: Tensor) -> bool:
    """Tell whether a product of matrices is faster; of float32 convolutions alone use TF32."""
    return x.dtype != torch.float32 or torch.is_autocast_enabled()
