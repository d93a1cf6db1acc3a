"""Large Separable Kernel Attention: a large kernel built from small convolutions.

From `Large Separable Kernel Attention: Rethinking the Large Kernel Attention
Design in CNN <https://arxiv.org/abs/2309.01439>`_ (Lau, Po and Rehman, 2023),
which splits the 2-D depth-wise kernels of VAN's attention (arXiv:2202.09741)
into 1-D ones. Module names are those in the authors' weights.
"""

from collections import OrderedDict
from typing import NamedTuple

from mmengine.model import BaseModule, Sequential
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..fast.door import has_fast_path

ATTENTIONS = ('LSKA', 'LKA', 'LSKA-trivial', 'LKA-trivial')


class KernelSplit(NamedTuple):
    """Two depth-wise kernels: ``local`` taps, then ``far`` taps ``dilation`` pixels apart."""

    local: int
    far: int
    dilation: int

    @property
    def kernel_size(self) -> int:
        """Side of the receptive field of the two kernels together, in pixels."""
        return self.local + self.dilation * (self.far - 1)


def split_kernel(kernel_size: int) -> KernelSplit:
    """Split a kernel into a local and a far part that together cover exactly its size.

    Both are odd, so that they can be centered.

    Raises:
        ValueError: If no such split exists; names the nearest sizes with one.
    """
    if not isinstance(kernel_size, int):
        raise ValueError(f'kernel_size={kernel_size!r} is not an integer.')
    dilation = 2 if kernel_size <= 11 else 3
    split = KernelSplit(2 * dilation - 1, kernel_size // dilation, dilation)
    if kernel_size <= 0 or split.far % 2 == 0 or split.kernel_size != kernel_size:
        valid = [7, *range(11, kernel_size + 7, 6)]  # by two taps more, 3 pixels apart
        nearest = [k for k in valid if k < kernel_size][-1:]
        nearest += [k for k in valid if k > kernel_size][:1]
        raise ValueError(
            f'kernel_size={kernel_size} cannot be split into two centered kernels; the nearest '
            f'valid sizes: {" and ".join(map(str, nearest))} (published: 7, 11, 23, 35, 53).'
        )
    return split


def kernel_layout(attention: str, kernel_size: int) -> dict[str, tuple[tuple[int, int], int]]:
    """Return the depth-wise convolutions of a gate, in the order of application.

    Returns:
        Module name to ((height, width), dilation).

    Raises:
        ValueError: On an unknown ``attention`` or an invalid ``kernel_size``.
    """
    k = kernel_size
    local, far, dilation = split_kernel(k)
    layouts = {
        'LSKA': dict(
            conv0h=((1, local), 1),
            conv0v=((local, 1), 1),
            conv_spatial_h=((1, far), dilation),
            conv_spatial_v=((far, 1), dilation),
        ),
        'LKA': dict(conv0=((local, local), 1), conv_spatial=((far, far), dilation)),
        'LSKA-trivial': dict(conv0h=((1, k), 1), conv0v=((k, 1), 1)),
        'LKA-trivial': dict(conv0=((k, k), 1)),
    }
    if attention not in layouts:
        raise ValueError(f'attention={attention!r} is unknown; valid: {", ".join(ATTENTIONS)}.')
    return layouts[attention]


def depthwise_conv(channels: int, kernel: tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """Build a depth-wise convolution that keeps height and width."""
    height, width = kernel
    padding = dilation * (height // 2), dilation * (width // 2)
    return nn.Conv2d(channels, channels, kernel, 1, padding, dilation, channels)


@MODELS.register_module()
@has_fast_path('gate')
class LSKA(Sequential):
    """Large-kernel gate: scale each pixel by a factor computed from its neighborhood.

    ``x * conv1(depthwise(x))``, where the depth-wise convolutions of
    `kernel_layout` together cover ``kernel_size`` x ``kernel_size`` pixels. Also a
    plugin layer of mmcv, for ``plugins`` of mmdet's and mmseg's ResNet.

    Args:
        in_channels: Channels of the input and of the output.
        kernel_size: Side of the receptive field, in pixels.
        attention: ``'LSKA'``, 1-D convolutions in two steps (the paper's);
            ``'LKA'``, VAN's 2-D ones in two steps; ``'LSKA-trivial'`` and
            ``'LKA-trivial'``, the same in one step without dilation.
        init_cfg: Initialization, in MMEngine's form.

    Raises:
        ValueError: See `kernel_layout`.
    """

    _abbr_ = 'lska'  # the plugin's name in a block, and in checkpoints

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 23,
        attention: str = 'LSKA',
        init_cfg: dict | list | None = None,
    ):
        layout = kernel_layout(attention, kernel_size)
        convs: OrderedDict[str, nn.Module] = OrderedDict(
            (name, depthwise_conv(in_channels, *conv)) for name, conv in layout.items()
        )
        convs['conv1'] = nn.Conv2d(in_channels, in_channels, 1)
        super().__init__(convs, init_cfg=init_cfg)
        self.in_channels = in_channels
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``: (B, C, H, W) to (B, C, H, W)."""
        return x * super().forward(x)


@has_fast_path('attention')
class Attention(BaseModule):
    """1x1, GELU, gate, 1x1, plus its own input: (B, C, H, W) to the same."""

    def __init__(self, channels: int, kernel_size: int, attention: str):
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LSKA(channels, kernel_size, attention)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))
