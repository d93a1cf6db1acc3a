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


def weights_like(x: Tensor) -> tuple:
    """Return the device and the dtypes that weights must have."""
    return x.is_cpu, x.get_device(), (x.dtype,)


def prefers_channels_last(x: Tensor, backbone: nn.Module) -> bool:
    """Tell whether a backbone is faster with maps in channels_last."""
    return True


def find(kind: str, x: Tensor) -> Callable[[Any, Tensor], Tensor] | None:
    """Return a function of a module of ``kind`` and a map that keeps the map's layout; or None."""
    function: Any
    if torch.is_grad_enabled():
        function = getattr(_TRAINING, kind)
    elif (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and min(x.shape[1], x.shape[2] * x.shape[3]) > 1  # oneDNN has no layout for others
    ):
        function = _INFERENCE[kind]
    else:
        return None
    return functools.partial(_in_channels_last, function)


def _in_channels_last(function: Callable, module: Any, x: Tensor) -> Tensor:
    last = x.contiguous(memory_format=LAST)
    out = function(module, last)
    return out if last is x else out.contiguous()


_TRAINING = Way(gradients.depthwise, gradients.conv1x1, gradients.conv_of_gelu)


# --- Inference: activations, products and sums inside oneDNN's convolutions ----------------


class _Inference:
    """Functions of a module and a map in channels_last, with the weights as stored."""

    def gate(self, gate: Any, x: Tensor) -> Tensor:
        """``x * conv1(depthwise(x))``."""
        *convs, last = gate
        out = x
        for conv in convs:
            out = self._depthwise(conv, out)
        return self._convolve(last, out, 'none').mul_(x)

    def gated(self, branch: Any, x: Tensor) -> Tensor:
        """All but the last convolution of `attention`."""
        return self.gate(branch.spatial_gating_unit, self._convolve(branch.proj_1, x, 'gelu'))

    def attention(self, branch: Any, x: Tensor) -> Tensor:
        """``x + proj_2(gate(gelu(proj_1(x))))``."""
        return self._convolve_and_add(branch.proj_2, self.gated(branch, x), x)

    def mlp(self, branch: Any, x: Tensor, add: bool = False) -> Tensor:
        """``fc2(gelu(dwconv(fc1(x))))``; with ``add`` plus ``x``, whose memory it may reuse.

        The hidden map is several times as wide as ``x``. If it is large, it is computed
        in groups of channels that fit in the processor's cache.
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
                self._convolve_into(fc2, hidden, out, part, with_bias=False)
            elif not add:
                out = self._convolve(fc2, hidden, 'none', inputs=part)
            elif width < channels:  # the other groups need x
                out = self._convolve_and_add(fc2, hidden, x, part)
            else:
                out = self._convolve_into(fc2, hidden, x)
        return out

    # One convolution

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
        self, conv: Any, x: Tensor, activation: str, outputs: slice = ALL, inputs: slice = ALL
    ) -> Tensor:
        """A convolution, and an activation."""
        arguments = self._arguments(conv, x, outputs, inputs)
        return torch.ops.mkldnn._convolution_pointwise(x, *arguments, activation, [], 'none')

    def _convolve_and_add(
        self, conv: Any, x: Tensor, summand: Tensor, inputs: slice = ALL
    ) -> Tensor:
        """A 1 x 1 convolution plus a map."""
        arguments = self._arguments(conv, x, inputs=inputs)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, summand, *arguments, 'add', 1.0, None, [], None
        )

    def _convolve_into(
        self, conv: Any, x: Tensor, summand: Tensor, inputs: slice = ALL, with_bias: bool = True
    ) -> Tensor:
        """A 1 x 1 convolution plus a map, in the memory of the map."""
        weight, bias, *rest = self._arguments(conv, x, inputs=inputs)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            summand, x, weight, bias if with_bias else None, *rest, 'add', 1.0, None, [], None
        )

    def _depthwise(self, conv: Any, x: Tensor) -> Tensor:
        """A depth-wise convolution; dilated rows as columns, see `gradients.depthwise`."""
        (height, width), (dilation, _) = conv.kernel_size, conv.dilation
        if height > 1 or dilation == 1:
            return self._convolve(conv, x, 'none')
        maps = as_columns(x)
        padding, groups = (dilation * (width // 2), 0), x.shape[1]
        weight = self._weight(conv, maps, transposed=True)
        out = torch.ops.mkldnn._convolution_pointwise(
            maps, weight, conv.bias, padding, (1, 1), (dilation, 1), groups, 'none', [], 'none'
        )
        return as_rows(out, x)


class _Deployed(_Inference, dict):
    """The same with weights that are kept in oneDNN's own memory layout.

    Otherwise oneDNN converts the weights in every call, which for small maps takes as long
    as the convolution. A packed weight belongs to one tensor and its version, which PyTorch
    increments when it changes the tensor, but not for changes through ``.data``, in NumPy,
    or by a fused optimizer.
    """

    def __reduce__(self):  # copies start empty
        return _Deployed, ()

    def block(self, block: Any, x: Tensor) -> Tensor:
        """What `FusedBlock` computes."""
        out = x * block.shortcut
        out = self._convolve_into(block.attn.proj_2, self.gated(block.attn, x), out)
        return self.mlp(block.mlp, out, add=True)

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


def _deployed(block: Any, x: Tensor) -> Tensor:
    return block.__dict__.setdefault('_packed', _Deployed()).block(block, x)


_PLAIN = _Inference()
_INFERENCE = dict(gate=_PLAIN.gate, attention=_PLAIN.attention, mlp=_PLAIN.mlp, deployed=_deployed)
