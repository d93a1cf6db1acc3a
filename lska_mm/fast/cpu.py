"""For a CPU: oneDNN, whose convolutions are fastest in channels_last."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import gradients
from .gradients import as_columns, as_rows
from .way import Way

ALL, LAST = slice(None), torch.channels_last
CACHED = 2**20  # numbers of a map that stay in the cache until they are used: 4 MiB


def _pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def prefers_channels_last(x: Tensor, backbone: nn.Module) -> bool:
    """Tell whether a backbone is faster with maps in channels_last."""
    return True


def find(kind: str, x: Tensor) -> Callable[[Any, Tensor], Tensor] | None:
    """Return a function of a module of ``kind`` and a map that keeps the map's layout; or None."""
    if torch.is_grad_enabled():
        return functools.partial(_in_channels_last, getattr(_TRAINING, kind))
    if (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and min(x.shape[1], x.shape[2] * x.shape[3]) > 1  # oneDNN has no layout for others
    ):
        return functools.partial(_in_channels_last, getattr(_INFERENCE, kind))
    return None


def _in_channels_last(function: Callable, module: Any, x: Tensor) -> Tensor:
    last = x.contiguous(memory_format=LAST)
    out = function(module, last)
    return out if last is x else out.contiguous()


class _Training(Way):
    depthwise = staticmethod(gradients.depthwise)
    conv1x1 = staticmethod(gradients.conv1x1)
    conv_of_gelu = staticmethod(gradients.conv_of_gelu)


class _Inference(Way):
    """Activations, products and sums inside oneDNN's convolutions, with the weights as stored."""

    def depthwise(self, conv: Any, x: Tensor) -> Tensor:
        """Dilated rows as columns, see `gradients.depthwise`."""
        (height, width), (dilation, _) = conv.weight.shape[2:], conv.dilation
        if height > 1 or dilation == 1:
            return self._convolve(conv, x)
        maps = as_columns(x)
        padding, groups = (dilation * (width // 2), 0), x.shape[1]
        weight = self._weight(conv, maps, transposed=True)
        out = torch.ops.mkldnn._convolution_pointwise(
            maps, weight, conv.bias, padding, (1, 1), (dilation, 1), groups, 'none', [], 'none'
        )
        return as_rows(out, x)

    def conv1x1(self, conv: Any, x: Tensor) -> Tensor:
        return self._convolve(conv, x)

    def gelu_of_conv(self, conv: Any, x: Tensor) -> Tensor:
        return self._convolve(conv, x, 'gelu')

    def plus_conv(self, summand: Tensor, conv: Any, x: Tensor, inputs: slice = ALL) -> Tensor:
        arguments = self._arguments(conv, x, inputs=inputs)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, summand, *arguments, 'add', 1.0, None, [], None
        )

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        return factor.mul_(x)

    def mlp(self, branch: Any, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """The hidden map is several times as wide as ``x``.

        If it is large, it is computed in groups of channels that fit in the processor's cache.
        """
        fc1, dwconv, fc2 = branch.fc1, branch.dwconv, branch.fc2
        channels, pixels = len(dwconv.weight), _pixels(x)
        width = min(channels, max(32, CACHED // pixels // 32 * 32))
        out: Any = None
        for start in range(0, channels, width):
            part = slice(start, start + width) if width < channels else ALL
            hidden = self._convolve(fc1, x, 'none', part)
            hidden = self._convolve(dwconv, hidden, 'gelu', part)
            if out is not None:
                self._convolve_into(out, fc2, hidden, part, with_bias=False)
            elif summand is None:
                out = self._convolve(fc2, hidden, inputs=part)
            else:
                out = self.plus_conv(summand, fc2, hidden, part)
        return out

    def deployed(self, block: Any, x: Tensor) -> Tensor:
        return Way.deployed(block.__dict__.setdefault('_packed', _Packed()), block, x)

    def _weight(self, conv: Any, x: Tensor, transposed: bool = False) -> Tensor:
        """The weight of a convolution of ``x``, or its transpose."""
        return conv.weight.transpose(2, 3) if transposed else conv.weight

    def _arguments(self, conv: Any, x: Tensor, outputs: slice = ALL, inputs: slice = ALL) -> tuple:
        """The arguments of oneDNN for a convolution, or for some of its channels."""
        whole = outputs is inputs is ALL
        weight = self._weight(conv, x) if whole else conv.weight[outputs, inputs]
        groups = 1 if conv.groups == 1 else x.shape[1]
        bias = conv.bias if outputs is ALL else conv.bias[outputs]
        return weight, bias, conv.padding, (1, 1), conv.dilation, groups

    def _convolve(
        self, conv: Any, x: Tensor, activation: str = 'none', outputs: slice = ALL,
        inputs: slice = ALL,
    ) -> Tensor:  # fmt: skip
        """A convolution, and an activation."""
        arguments = self._arguments(conv, x, outputs, inputs)
        return torch.ops.mkldnn._convolution_pointwise(x, *arguments, activation, [], 'none')

    def _convolve_into(
        self, out: Tensor, conv: Any, x: Tensor, inputs: slice = ALL, with_bias: bool = True
    ) -> Tensor:
        """Add a convolution to a map, in its memory."""
        weight, bias, *rest = self._arguments(conv, x, inputs=inputs)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, weight, bias if with_bias else None, *rest, 'add', 1.0, None, [], None
        )


class _Packed(_Inference, dict):
    """The same with weights that are kept in oneDNN's own memory layout.

    Otherwise oneDNN converts the weights in every call, which for small maps takes as long
    as the convolution. A packed weight belongs to one tensor and its version, which PyTorch
    increments when it changes the tensor, but not for changes through ``.data``, in NumPy,
    or by a fused optimizer.
    """

    def __reduce__(self):  # copies start empty
        return _Packed, ()

    def plus_conv(self, summand: Tensor, conv: Any, x: Tensor, inputs: slice = ALL) -> Tensor:
        if inputs is not ALL:  # the other groups of channels need the summand
            return super().plus_conv(summand, conv, x, inputs)
        return self._convolve_into(summand, conv, x)

    def _weight(self, conv: Any, x: Tensor, transposed: bool = False) -> Tensor:
        weight = conv.weight
        if weight.is_inference():  # has no version
            return super()._weight(conv, x, transposed)
        # Packed for maps of another size, oneDNN is up to twice as slow.
        size = _pixels(x).bit_length()
        key = weight._version, weight.data_ptr(), size, transposed, conv.dilation
        found = self.get(id(conv))
        if found is None or found[0] is not weight or found[1] != key:
            plain = super()._weight(conv, x, transposed).detach()
            dilation = conv.dilation
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                plain.to_mkldnn(), [d * (n // 2) for d, n in zip(dilation, plain.shape[2:])],
                (1, 1), dilation, conv.groups, list(x.shape),
            )  # fmt: skip
            # The last keeps the memory from being reused for another tensor.
            found = self[id(conv)] = weight, key, packed, weight.detach()
        return found[2]


_TRAINING, _INFERENCE = _Training(), _Inference()
