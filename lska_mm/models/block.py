"""What a stage of VAN (arXiv:2202.09741) is made of: a patch embedding, and blocks."""

from collections.abc import Callable

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from .eager import is_eager, is_eager_cpu, is_untouched
from .layers import (
    DepthwiseConv2d,
    PointwiseConv2d,
    bottleneck,
    can_replace,
    conv_of_gelu,
    gelu,
    recompute,
    scaled,
)
from .lska import Attention


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """Build a norm of maps (B, C, H, W).

    Raises:
        ValueError: On LayerNorm, which would take the width for the channels.
    """
    norm = build_norm_layer(norm_cfg, channels)[1]
    if type(norm) is nn.LayerNorm:
        raise ValueError(
            f'norm_cfg={dict(norm_cfg)} normalizes the last axis, which is the width of the maps '
            'in the blocks; take BN, SyncBN or GN. stage_norm_cfg is the norm after each stage.'
        )
    return norm


class MLP(BaseModule):
    """1x1 to ``ratio`` times the channels, 3x3 depth-wise, GELU, 1x1 back.

    With a ``scale`` (C,) the result is scaled.
    """

    def __init__(self, channels: int, ratio: float, drop_rate: float):
        super().__init__()
        hidden = int(channels * ratio)
        self.fc1 = PointwiseConv2d(channels, hidden)
        self.dwconv = DepthwiseConv2d(hidden, (3, 3))
        self.fc2 = PointwiseConv2d(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        fc1, dwconv, fc2, drop = self.fc1, self.dwconv, self.fc2, self.drop
        drops = not is_untouched(drop, nn.Dropout) or (drop.training and drop.p > 0)
        if can_replace(x, fc1, dwconv, fc2) and not drops and scale is None:
            return bottleneck(fc1, dwconv, fc2, x)
        hidden = dwconv(fc1(x))
        again = torch.is_grad_enabled() and is_eager(hidden)
        if again and is_untouched(fc2, PointwiseConv2d) and not drops:
            return conv_of_gelu(fc2, hidden, scale)
        hidden = drop(gelu(hidden))
        return drop(fc2(hidden) if scale is None else scaled(fc2, hidden, scale))


class Block(BaseModule):
    """Attention, then MLP; each normalized, scaled and added to its input."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        attention: str,
        ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        norm_cfg: dict,
        with_cp: bool,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = build_norm(norm_cfg, channels)
        self.attn = Attention(channels, kernel_size, attention)
        self.norm2 = build_norm(norm_cfg, channels)
        self.mlp = MLP(channels, ratio, drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-2))

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, scale: Tensor) -> Tensor:
        """Add scale * branch(norm(x)) to ``x``."""
        if not (self.training or torch.is_grad_enabled()):
            return torch.addcmul(x, branch(norm(x)), scale[:, None, None])
        run: Callable[..., Tensor] = branch
        if not (is_eager_cpu(x) and is_untouched(branch, Attention, MLP)):

            def run(x: Tensor, scale: Tensor) -> Tensor:
                return branch(x) * scale[:, None, None]

        if self.with_cp and self.training:
            # The norm stays outside: recomputed, it would count a batch twice.
            return x + self.drop_path(recompute(run, norm(x), scale))
        return x + self.drop_path(run(norm(x), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.norm1, self.attn, self.layer_scale_1)
        return self._add(x, self.norm2, self.mlp, self.layer_scale_2)


class PatchEmbed(BaseModule):
    """Overlapping patches: (B, C_in, H, W) to (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels, channels, patch_size, stride, norm_cfg):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride, patch_size // 2)
        self.norm = build_norm(norm_cfg, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))
