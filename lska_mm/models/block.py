"""What a stage of VAN (arXiv:2202.09741) is made of: a patch embedding, and blocks."""

from collections.abc import Callable

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from .eager import is_eager_cpu, is_untouched
from .layers import (
    DepthwiseConv2d,
    PointwiseConv2d,
    bottleneck,
    can_replace,
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
        if scale is None:
            convs = self.fc1, self.dwconv, self.fc2
            drops = self.drop.training or not is_untouched(self.drop, nn.Dropout)
            if can_replace(x, *convs) and not drops:
                return bottleneck(*convs, x)
            return self.drop(self.fc2(self.drop(gelu(self.dwconv(self.fc1(x))))))
        hidden = self.dwconv(self.fc1(x))
        if is_untouched(self.fc2, PointwiseConv2d) and is_untouched(self.drop, nn.Dropout):
            # Activated again in the backward pass: the widest map is kept once, not twice.
            return recompute(self._tail, hidden, scale, random=self.drop.p > 0)
        return self._tail(hidden, scale)

    def _tail(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.drop(scaled(self.fc2, self.drop(gelu(x)), scale))


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
            return x + self.drop_path(recompute(run, norm(x), scale, random=True))
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
