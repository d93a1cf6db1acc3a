"""The limit on paper: what operators read, write and multiply, over the rates of a device."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operators that only make room or another view.
_NO_KERNEL = ('empty', 'detach', 'alias', 'view', 'expand', 'permute', 'transpose', 'slice', 't')


class Operator(NamedTuple):
    """An operator of a step that starts a kernel."""

    name: str
    bytes: int  # read and written, each tensor once
    multiply_adds: int  # of convolutions and matrix products


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not name.strip('_').removeprefix('unsafe_').startswith(_NO_KERNEL):
            tensors = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.operators.append(Operator(name, moved, _multiply_adds(name, args, out)))
        return out


def _multiply_adds(name: str, args: tuple, out: Any) -> int:
    if name == 'convolution':
        return out.numel() * args[1][0].numel()
    if name == 'convolution_backward':  # of the maps and of the weights, where they are wanted
        return args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
    return out.numel() * args[-1].shape[-2] if name in ('mm', 'addmm', 'bmm') else 0


def operators(model: nn.Module, images: Tensor, train: bool) -> list[Operator]:
    """List the operators of an inference, or of a forward and a backward pass.

    Computes nothing: all is on the meta device, in the type of ``images`` (B, 3, H, W).
    """
    model = copy.deepcopy(model).to('meta', images.dtype)
    model.train(train)  # which returns nothing in some toolboxes
    with _Counter() as counter, torch.set_grad_enabled(train):
        out = model(images.to('meta'))
        if train:
            out = out[-1] if isinstance(out, tuple) else out
            out.sum().backward()
    return counter.operators


def least_milliseconds(found: list[Operator], copy_rate: float, matmul_rate: float) -> float:
    """The sum, over operators, of the longer of moving and multiplying.

    Args:
        found: What `operators` returned.
        copy_rate: Bytes a second, those read and those written.
        matmul_rate: Multiply-adds a second.
    """
    return 1e3 * sum(max(o.bytes / copy_rate, o.multiply_adds / matmul_rate) for o in found)
