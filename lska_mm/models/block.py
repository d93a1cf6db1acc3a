"""The parts of a stage of VAN (arXiv:2202.09741): a patch embedding, and blocks."""

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..fast.door import has_fast_path
from .lska import Attention, depthwise_conv


@has_fast_path('mlp')
class MLP(BaseModule):
    """1x1 to ``ratio`` times the channels, 3x3 depth-wise, GELU, 1x1 back."""

    def __init__(self, channels: int, ratio: float, drop_rate: float):
        super().__init__()
        hidden = int(channels * ratio)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = depthwise_conv(hidden, (3, 3))
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(self.fc1(x))))))


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

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self._run(self.attn, self.norm1(x)), self.layer_scale_1)
        return self._add(x, self._run(self.mlp, self.norm2(x)), self.layer_scale_2)

    def _add(self, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(x, self.drop_path(branch), scale[:, None, None])

    def _run(self, branch: nn.Module, x: Tensor) -> Tensor:
        if self.with_cp and isinstance(x, Tensor) and x.requires_grad:
            return checkpoint(branch, x, use_reentrant=False)
        return branch(x)


class PatchEmbed(BaseModule):
    """Overlapping patches: (B, C_in, H, W) to (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels, channels, patch_size, stride, norm_cfg):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride, patch_size // 2)
        self.norm = build_norm(norm_cfg, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """Build a norm for maps (B, C, H, W).

    Raises:
        ValueError: If it normalizes the last axis, the width, as LayerNorm does.
    """
    norm = build_norm_layer(norm_cfg, channels)[1]
    if normalizes_last_axis(norm, channels):
        raise ValueError(
            f'norm_cfg={dict(norm_cfg)} normalizes the last axis, which is the width of the maps '
            'in the blocks; use BN, SyncBN or GN. stage_norm_cfg is the norm after each stage.'
        )
    return norm


@torch.no_grad()
def normalizes_last_axis(norm: nn.Module, channels: int) -> bool:
    """Tell whether a norm takes (..., C), like LayerNorm, not (B, C, H, W), like BN and LN2d."""
    if not hasattr(norm, 'normalized_shape'):
        return False
    like = next(norm.parameters(), torch.empty(()))
    try:  # a map whose last axis has another size
        norm(like.new_zeros(1, channels, 1, channels + 1))
    except RuntimeError:
        return True
    return False
