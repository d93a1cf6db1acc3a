"""Folding norms and layer scales into convolutions, for inference."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..fast.door import has_fast_path
from .block import MLP, Block, PatchEmbed
from .lska import Attention

Affine = tuple[Tensor, Tensor]  # a factor and a summand for each channel


@has_fast_path('deployed')
class FusedBlock(BaseModule):
    """A `Block` for inference, with norms and layer scales folded into its convolutions.

    With BN(x) = a x + b and layer scale s, the first half of a block is
    x + s (proj_2(g) + a x + b) = (1 + s a) x + (s proj_2(g) + s b).
    """

    def __init__(self, block: Block, norm1: Affine, norm2: Affine):
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp
        scale_1, scale_2 = block.layer_scale_1, block.layer_scale_2
        fold(self.attn.proj_1, before=norm1)
        fold(self.attn.proj_2, after=(scale_1, scale_1 * norm1[1]))
        fold(self.mlp.fc1, before=norm2)
        fold(self.mlp.fc2, after=(scale_2, torch.zeros_like(scale_2)))
        shortcut = (1 + scale_1 * norm1[0])[:, None, None]
        self.shortcut = nn.Parameter(shortcut, scale_1.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        gated = attn.spatial_gating_unit(attn.activation(attn.proj_1(x)))
        x = x * self.shortcut + attn.proj_2(gated)
        return x + self.mlp(x)


def fold(conv: nn.Conv2d, before: Affine | None = None, after: Affine | None = None) -> None:
    """Fold a factor and a summand before or after a convolution into it.

    Before it, they are exact at the borders only without padding. The convolution gets new
    parameters, as others may use the memory of the old ones.
    """
    assert conv.bias is not None
    weight, bias = conv.weight, conv.bias
    with torch.no_grad():
        if before is not None:
            factor, summand = before
            bias = bias + (weight * summand[None, :, None, None]).sum((1, 2, 3))
            weight = weight * factor[None, :, None, None]
        if after is not None:
            factor, summand = after
            bias = bias * factor + summand
            weight = weight * factor[:, None, None, None]
    conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias, conv.bias.requires_grad)


@torch.no_grad()
def fold_stages(stages: Sequence[tuple[PatchEmbed, ModuleList]]) -> None:
    """Fold all patch embeddings and blocks or, if one cannot be folded, none.

    Raises:
        TypeError: If one cannot be folded; names it, and what to do first.
    """
    norms, seen = dict[nn.Module, Affine](), dict[nn.Module, str]()
    for i, (patch_embed, blocks) in enumerate(stages, start=1):
        check_parts(f'patch_embed{i}', patch_embed, _FOLDED_PATCHES, seen)
        channels = patch_embed.proj.weight[:, 0, 0, 0]
        named = {f'patch_embed{i}.norm': patch_embed.norm}
        for j, block in enumerate(blocks):
            check_parts(f'block{i}.{j}', block, _FOLDED, seen)
            named |= {f'block{i}.{j}.norm1': block.norm1, f'block{i}.{j}.norm2': block.norm2}
        norms |= {norm: affine(name, norm, channels) for name, norm in named.items()}
    for patch_embed, blocks in stages:
        fold(patch_embed.proj, after=norms[patch_embed.norm])
        patch_embed.norm = nn.Identity()
        for j, block in enumerate(blocks):
            blocks[j] = FusedBlock(block, norms[block.norm1], norms[block.norm2])


# --- What can be folded -------------------------------------------------------------------

# The parts that are folded or removed, and their classes.
_CONV = (nn.Conv2d,)
_FOLDED_PATCHES = {'': (PatchEmbed,), 'proj': _CONV}
_FOLDED = {
    '': (Block,), 'attn': (Attention,), 'attn.proj_1': _CONV, 'attn.proj_2': _CONV,
    'mlp': (MLP,), 'mlp.fc1': _CONV, 'mlp.fc2': _CONV, 'drop_path': (DropPath, nn.Identity),
}  # fmt: skip
_REMOVERS = {
    prune.BasePruningMethod: 'torch.nn.utils.prune.remove',
    WeightNorm: 'torch.nn.utils.remove_weight_norm',
    SpectralNorm: 'torch.nn.utils.remove_spectral_norm',
}


def check_parts(
    name: str, module: Any, parts: dict[str, tuple], seen: dict[nn.Module, str]
) -> None:
    """Refuse a module whose parts cannot be folded; record them in ``seen``."""
    for path, classes in parts.items():
        part, own = module.get_submodule(path), f'{name}.{path}'.rstrip('.')
        check_as_built(own, part, *classes)
        first = seen.setdefault(part, own)
        if first != own:
            raise TypeError(f'{own} cannot be folded: it is shared with {first}; copy it.')
        if path in ('attn.proj_1', 'mlp.fc1') and (part.groups > 1 or part.padding != (0, 0)):
            raise TypeError(f'{own} cannot be folded: it has padding or groups.')


def check_as_built(name: str, module: Any, *classes: type) -> None:
    """Refuse a module that computes anything else than its class does with its weights."""
    hooks = [
        hook
        for kind in ('forward_pre', 'forward', 'backward_pre', 'backward')
        for hook in getattr(module, f'_{kind}_hooks').values()
    ]
    removers = [call for kind, call in _REMOVERS.items()
                if any(isinstance(hook, kind) for hook in hooks)]  # fmt: skip
    if parametrize.is_parametrized(module):
        removers = ['torch.nn.utils.parametrize.remove_parametrizations']
    if removers:
        reason = f"its weight is computed from others; call {removers[0]}(module, 'weight') first"
    elif hooks:
        reason = f'it has {len(hooks)} hooks, which would see other maps; remove them first'
    elif 'forward' in vars(module):
        reason = 'its forward was replaced; restore it first'
    elif classes and type(module) not in classes:
        reason = f'it is a {type(module).__name__}, not the original {classes[0].__name__}'
    elif nn.Conv2d in classes and module.bias is None:
        reason = 'it has no bias'
    else:
        return
    raise TypeError(f'{name} cannot be folded: {reason}.')


def affine(name: str, norm: nn.Module, like: Tensor) -> Affine:
    """Return the factor and the summand of each channel for a norm in inference.

    They are measured with zeros, ones and other numbers, so its class does not matter.
    ``like`` has a number for each channel.
    """
    check_as_built(name, norm)
    device = 'meta' if like.is_meta else 'cpu'
    twin = copy.deepcopy(norm).to(device, torch.float64).eval()
    ones = torch.ones(2, len(like), 3, 5, device=device, dtype=torch.float64)
    numbers = torch.arange(ones.numel(), device=device).view_as(ones).double().sin()
    summand = twin(torch.zeros_like(ones))
    factor = twin(ones) - summand
    if not like.is_meta and not torch.allclose(twin(numbers), factor * numbers + summand):
        raise TypeError(
            f'{name} cannot be folded: it is {norm}, and only BatchNorm with running statistics '
            'can be folded into a convolution.'
        )
    return factor[0, :, 0, 0].to(like), summand[0, :, 0, 0].to(like)
