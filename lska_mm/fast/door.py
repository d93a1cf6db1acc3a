"""Decide whether a part of the network can be computed faster, and how.

The network is written in plain operators. If it runs eagerly and has not been hooked,
modified or traced, `fast_path` returns a function with the same result. In every other
case the plain operators are used.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules import module as torch_module

from . import compiled, cpu, gpu

if hasattr(torch.compiler, 'is_compiling'):
    from torch.compiler import is_compiling

    is_autocast: Callable[[], bool] = functools.partial(torch.is_autocast_enabled, 'cpu')
else:  # torch 2.1
    from torch._dynamo import is_compiling

    is_autocast = torch.is_autocast_cpu_enabled


# The parts of a module, and the kind that each must be.
_PARTS: dict[str, dict[str, Any]] = {
    'attention': dict(proj_1='1x1', activation=nn.GELU, spatial_gating_unit='gate', proj_2='1x1'),
    'mlp': dict(fc1='1x1', dwconv='depthwise', act=nn.GELU, fc2='1x1', drop=nn.Dropout),
    'deployed': dict(attn='attention', mlp='mlp'),
}
_KINDS: dict[type, tuple[str, Callable]] = {}  # each class with a fast path, and its forward
_PLAIN = (Tensor, nn.Parameter)
_GLOBAL_HOOKS = [
    getattr(torch_module, f'_global_{kind}_hooks')
    for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')
]


def has_fast_path(kind: str) -> Callable[[type], type]:
    """Decorate a class of the network: its forward uses the fast path, if there is one.

    Subclasses do not use it.
    """

    def register(cls: Any) -> Any:
        plain = cls.forward

        @functools.wraps(plain)
        def forward(self: Any, x: Tensor) -> Tensor:
            fast = fast_path(self, x)
            return plain(self, x) if fast is None else fast(x)

        cls.forward = forward
        _KINDS[cls] = kind, forward
        return cls

    return register


def fast_path(module: nn.Module, x: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a faster function with the result of ``module(x)``; or None.

    Args:
        module: Of a class that `has_fast_path`.
        x: Map (B, C, H, W), in any layout, which the function keeps.
    """
    device = _device(x)
    if device is None or type(module) not in _KINDS:
        return None
    kind = _KINDS[type(module)][0]
    function = device.find(kind, x)
    dtypes = gpu.TYPES if x.is_cuda and torch.is_autocast_enabled() else (x.dtype,)
    if function is None or not _out_channels(module, kind, (x.device, dtypes), x.shape[1]):
        return None
    return functools.partial(function, module)


def preferred_layout(x: Any, backbone: nn.Module) -> torch.memory_format:
    """Return the memory layout in which a backbone is fastest for images (B, C, H, W)."""
    device = _device(x)
    if device is not None and device.prefers_channels_last(x, backbone):
        return torch.channels_last
    return layout_of(x)


def layout_of(x: Any) -> torch.memory_format:
    """Return the memory layout of a map (B, C, H, W); for a tracer's, the contiguous one."""
    last = isinstance(x, Tensor) and not x.is_contiguous() and x.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


# --- Conditions -------------------------------------------------------------------------


def _device(x: Any) -> Any:
    """Return the module for the device of ``x``; None if operators are hooked or traced."""
    if is_compiling():
        here = compiled.runs_here() and type(x) is Tensor and x.is_cuda
        return compiled if here else None
    if torch.jit.is_tracing() or type(x) is not Tensor:
        return None
    device: Any = cpu if x.is_cpu else gpu if x.is_cuda else None
    if (
        device is None
        or x.numel() == 0
        or any(_GLOBAL_HOOKS)
        or torch._C._len_torch_dispatch_stack()  # modes that count or record operators
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _methods() != _METHODS
        or (x.is_cpu and (x.dtype != torch.float32 or is_autocast()))
    ):
        return None
    return device


def _methods() -> tuple:
    """Return the functions that the plain operators call, which others may replace."""
    return (
        nn.Module._call_impl, nn.Conv2d.__call__, nn.Conv2d.forward, nn.Conv2d._conv_forward,
        nn.GELU.__call__, nn.GELU.forward, nn.Dropout.__call__, nn.Dropout.forward,
        F.conv2d, F.gelu, F.dropout,
    )  # fmt: skip


_METHODS = _methods()


def _out_channels(module: Any, kind: Any, like: tuple, channels: int) -> int:
    """Return the output channels of a module for ``channels``; 0 if it was modified."""
    state, cls = module.__dict__, type(module)
    if kind == '1x1' or kind == 'depthwise':
        return _out_channels_of_conv(state, kind, like, channels) if cls is nn.Conv2d else 0
    if kind is nn.GELU:
        return channels if cls is kind and state['approximate'] == 'none' else 0
    if kind is nn.Dropout:
        return channels if cls is kind and not (state['training'] and state['p']) else 0
    if _KINDS.get(cls) != (kind, cls.forward):
        return 0
    parts, inputs = state['_modules'], channels
    if kind == 'gate':  # the convolutions in their order, the last of them 1 x 1
        kinds = dict.fromkeys(parts, 'depthwise')
        kinds[next(reversed(parts), '')] = '1x1'
    else:
        kinds = _PARTS[kind]
    if parts.keys() != kinds.keys():
        return 0
    for name, part_kind in kinds.items():
        part = parts[name]
        if part is None or _is_listened_to(part.__dict__):
            return 0
        channels = _out_channels(part, part_kind, like, channels)
        if not channels:
            return 0
    return channels if channels == inputs else 0


def _is_listened_to(state: dict) -> bool:
    """Tell whether calling a module does anything beyond its class's forward."""
    return bool(
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
        or 'forward' in state
        or '_conv_forward' in state
        or '_call_impl' in state
        or '_compiled_call_impl' in state
    )


def _out_channels_of_conv(state: dict, kind: str, like: tuple, channels: int) -> int:
    """The same for a convolution that keeps height and width."""
    weight, bias = map(state['_parameters'].get, ('weight', 'bias'))
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN:
        return 0
    (out, inputs, height, width), dilation = weight.shape, state['dilation']
    device, dtypes = like
    if (
        state['padding'] != (dilation[0] * (height // 2), dilation[1] * (width // 2))
        or state['stride'] != (1, 1)
        or state['padding_mode'] != 'zeros'
        or not weight.device == bias.device == device
        or weight.dtype not in dtypes
        or bias.dtype is not weight.dtype
        or not weight.is_contiguous()
        or not bias.is_contiguous()
        or bias.shape != (out,)
    ):
        return 0
    if kind == '1x1':
        return out if state['groups'] == 1 and inputs == channels and height == width == 1 else 0
    known = state['groups'] == out == channels and inputs == 1 and dilation[0] == dilation[1]
    return out if known and height % 2 == width % 2 == 1 else 0
