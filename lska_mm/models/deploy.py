"""Folding norms and layer scales into convolutions, for inference."""

from typing import TYPE_CHECKING

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import PackedConv2d, bottleneck, can_replace, conv_add, gelu

if TYPE_CHECKING:
    from .block import Block


class FusedBlock(BaseModule):
    """What `Block` computes in inference, norms and layer scales in its convolutions.

    With BN(x) = a x + b and layer scale s, the first half of a block is
    x + s (proj_2(g) + a x + b) = (1 + s a) x + (s proj_2(g) + s b).
    """

    def __init__(self, block: 'Block'):
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp
        scale_1, scale_2 = block.layer_scale_1, block.layer_scale_2
        a, b = affine(block.norm1)
        fold(self.attn.proj_1, before=(a, b))
        fold(self.attn.proj_2, after=(scale_1, scale_1 * b))
        fold(self.mlp.fc1, before=affine(block.norm2))
        fold(self.mlp.fc2, after=(scale_2, torch.zeros_like(scale_2)))
        self.shortcut = nn.Parameter((1 + scale_1 * a)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp = self.attn, self.mlp
        mine = can_replace(x, attn.proj_2)  # what it makes, nobody else is given
        x = conv_add(attn.proj_2, attn.gated(x), x * self.shortcut, into=True)
        if mine and can_replace(x, mlp.fc1, mlp.dwconv, mlp.fc2):
            return bottleneck(mlp.fc1, mlp.dwconv, mlp.fc2, x, into=True)
        return mlp.fc2(gelu(mlp.dwconv(mlp.fc1(x)))) + x


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in inference as a factor and a summand for each channel.

    Raises:
        TypeError: If it is another norm, which depends on the image.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        raise TypeError(f'Only BatchNorm can be part of a convolution, not {norm}.')
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return factor, norm.bias - factor * norm.running_mean  # type: ignore[operator]


def fold(
    conv: nn.Conv2d,
    before: tuple[Tensor, Tensor] | None = None,
    after: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Make a factor and a summand before or after a convolution part of it.

    Before it they are exact at the borders only where nothing is padded.
    """
    assert conv.bias is not None
    with torch.no_grad():
        if before is not None:
            factor, summand = before
            conv.bias += (conv.weight * summand[None, :, None, None]).sum((1, 2, 3))
            conv.weight *= factor[None, :, None, None]
        if after is not None:
            factor, summand = after
            conv.bias.mul_(factor).add_(summand)
            conv.weight *= factor[:, None, None, None]


def pack(module: nn.Module) -> None:
    """Make the dense convolutions in ``module`` `PackedConv2d`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.groups == 1:
                setattr(parent, name, PackedConv2d.of(child))
