"""Whether a faster way may be taken: where nobody can tell but by the time it takes."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

if hasattr(torch.compiler, 'is_compiling'):
    from torch.compiler import is_compiling

    def is_autocast() -> bool:
        return torch.is_autocast_enabled('cpu')
else:  # torch 2.1
    from torch._dynamo import is_compiling

    is_autocast = torch.is_autocast_cpu_enabled

depthwise: Any = None  # kernels for a GPU, if there is one, and Triton
if torch.version.cuda and hasattr(torch, 'get_autocast_dtype') and torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from . import depthwise  # type: ignore[no-redef]

LARGE = 2**24  # numbers of images from which a GPU computes for longer than its host launches
FEW = 1024  # pixels up to which a product of matrices is faster than a 1 x 1 convolution


def is_eager(x: Any) -> bool:
    """Tell whether what is called now is computed now."""
    return (
        not (is_compiling() or torch.jit.is_tracing())
        and type(x) in (Tensor, nn.Parameter)  # no tracer's, no other class
        and x.numel() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_eager_cpu(x: Any) -> bool:
    """Tell whether oneDNN computes now what is called now."""
    return is_eager(x) and x.is_cpu


def has_kernels(x: Any) -> bool:
    """Tell whether `depthwise` is for ``x`` in channels_last."""
    return (
        is_eager(x)
        and x.is_cuda
        and depthwise is not None
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch._C._len_torch_dispatch_stack()  # modes that count, say, do not know it
        and depthwise.works(x.get_device())
    )


def prefers_channels_last(x: Any, module: nn.Module) -> bool:
    """Tell whether ``module`` is faster for maps that are in memory as (B, H, W, C)."""
    if is_eager_cpu(x):
        return True
    return has_kernels(x) and x.numel() >= LARGE and not any(map(_wants_nchw, module.modules()))


def _wants_nchw(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):  # depth-wise ones of PyTorch are slower in channels_last
        return module.groups > 1 and math.prod(module.kernel_size) > depthwise.MOST_TAPS
    return type(module).__module__.startswith('mmcv.ops')  # SyncBN's too takes any map for NCHW


def is_channels_last(x: Any) -> bool:
    """Tell whether a map (B, C, H, W) is in memory as (B, H, W, C)."""
    return isinstance(x, Tensor) and not x.is_contiguous() and x.stride(1) == 1


def has_few_pixels(x: Tensor) -> bool:
    """Tell whether oneDNN would spend more time on a convolution's weights than on its maps."""
    return is_eager_cpu(x) and x.shape[0] * x.shape[2] * x.shape[3] <= FEW


def is_product(x: Any) -> bool:
    """Tell whether a product of matrices is faster than a 1 x 1 convolution of ``x``."""
    if has_few_pixels(x):
        return True
    # of float32 PyTorch lets convolutions alone use TF32
    half = isinstance(x, Tensor) and (x.dtype != torch.float32 or torch.is_autocast_enabled())
    return half and is_channels_last(x) and has_kernels(x)


def is_untouched(module: nn.Module, *kinds: type) -> bool:
    """Tell whether a module is of one of ``kinds``, and calling it does nothing more."""
    if is_compiling():  # torch 2.1 cannot compile what is below
        return isinstance(module, kinds)
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def can_fuse(x: Tensor) -> bool:
    """Tell whether oneDNN's fused convolutions apply.

    They have no gradient, and no mode of PyTorch (that counts, say) knows them.
    """
    return (
        not torch.is_grad_enabled()
        and is_eager_cpu(x)
        and x.dtype == torch.float32
        and not is_autocast()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )
