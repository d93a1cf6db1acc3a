"""LSKA-VAN: the Visual Attention Network with large separable kernels.

Network from `Visual Attention Network <https://arxiv.org/abs/2202.09741>`_ (Guo
et al., 2022), attention from arXiv:2309.01439 (see `lska`). Module names
follow the ImageNet weights that the authors of the latter published; arguments
follow OpenMMLab's backbones.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import adapt_state_dict
from .deploy import FusedBlock, affine, fold, pack
from .lska import LSKA
from .ops import (
    DepthwiseConv2d,
    PointwiseConv2d,
    bottleneck,
    conv1x1_add,
    conv_gelu,
    gelu,
    is_eager_cpu,
    recompute,
)

ARCHS = dict(
    tiny=dict(embed_dims=[32, 64, 160, 256], depths=[3, 3, 5, 2], ffn_ratios=[8, 8, 4, 4]),
    small=dict(embed_dims=[64, 128, 320, 512], depths=[2, 2, 4, 2], ffn_ratios=[8, 8, 4, 4]),
    base=dict(embed_dims=[64, 128, 320, 512], depths=[3, 3, 12, 3], ffn_ratios=[8, 8, 4, 4]),
    large=dict(embed_dims=[64, 128, 320, 512], depths=[3, 5, 27, 3], ffn_ratios=[8, 8, 4, 4]),
)


class Attention(BaseModule):
    """1x1, GELU, gate, 1x1, plus its own input: (B, C, H, W) to the same.

    In training the sum is scaled; without a scale the memory of ``x`` is used up.
    """

    def __init__(self, channels: int, kernel_size: int, attention: str):
        super().__init__()
        self.proj_1 = PointwiseConv2d(channels, channels)
        self.spatial_gating_unit = LSKA(channels, kernel_size, attention)
        self.proj_2 = PointwiseConv2d(channels, channels)

    def gated(self, x: Tensor) -> Tensor:
        """All but the last convolution."""
        return self.spatial_gating_unit(conv_gelu(self.proj_1, x))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        gated = self.gated(x)
        if scale is None:
            return conv1x1_add(self.proj_2, gated, x)
        return torch.addcmul(self.proj_2(gated, scale), x, scale[:, None, None])


class MLP(BaseModule):
    """1x1 to ``ratio`` times the channels, 3x3 depth-wise, GELU, 1x1 back.

    In training the result is scaled.
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
            return bottleneck(self.fc1, self.dwconv, self.fc2, x)
        # Activated anew in the backward pass: the widest map is kept once, not twice.
        return recompute(
            lambda x, scale: self.drop(self.fc2(self.drop(gelu(x)), scale)),
            self.dwconv(self.fc1(x)),
            scale,
            random=self.drop.p > 0,
        )


class Block(BaseModule):
    """Attention, then MLP; each normalised, scaled and added to its input."""

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
        self.norm1 = build_norm_layer(norm_cfg, channels)[1]
        self.attn = Attention(channels, kernel_size, attention)
        self.norm2 = build_norm_layer(norm_cfg, channels)[1]
        self.mlp = MLP(channels, ratio, drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-2))

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, scale: Tensor) -> Tensor:
        """Add scale * branch(norm(x)) to ``x``."""
        if not (self.training or torch.is_grad_enabled()):
            return torch.addcmul(x, branch(norm(x)), scale[:, None, None])
        if self.with_cp and self.training:
            # The norm stays outside: recomputed, it would count a batch twice.
            return x + self.drop_path(
                recompute(branch, norm(x), scale, random=self.mlp.drop.p > 0)
            )
        return x + self.drop_path(branch(norm(x), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.norm1, self.attn, self.layer_scale_1)
        return self._add(x, self.norm2, self.mlp, self.layer_scale_2)


class PatchEmbed(BaseModule):
    """Overlapping patches: (B, C_in, H, W) to (B, C, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, channels: int, patch_size: int, stride: int, norm_cfg: dict
    ):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride, patch_size // 2)
        self.norm = build_norm_layer(norm_cfg, channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def _norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` over the channels of (B, C, H, W), wherever it wants them."""
    if type(norm) is not nn.LayerNorm:
        return norm(x)
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class LSKAVAN(BaseModule):
    """LSKA-VAN backbone.

    Weights in any published layout load without conversion; weights of another
    network, size or kernel are refused (see `lska_mm.checkpoint`).

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict of the
            lists ``embed_dims``, ``depths``, ``ffn_ratios``, a value a stage.
        kernel_size: Side of the attention's receptive field, in pixels, or a
            list of them, a value a stage: 7, 11, 23, 35 and 53 were published,
            see `split_kernel` for others.
        attention: The kind of gate, see `LSKA`.
        in_channels: Channels of the image.
        drop_rate: Dropout probability inside the MLPs.
        drop_path_rate: Probability of skipping a branch in the last block; it
            rises linearly from 0 in the first.
        out_indices: Stages whose maps are returned, negative from the end.
            Stages after the last one asked for are not built.
        frozen_stages: Stages 0 up to this one neither train nor update their
            statistics; -1 freezes none.
        norm_eval: Keep BatchNorm's statistics fixed in training.
        with_cp: Recompute the branches in the backward pass to save memory.
        deploy: Build what `switch_to_deploy` makes, to load its weights.
        norm_cfg: Norms of patch embeddings and blocks.
        stage_norm_cfg: Norm at the end of each stage.
        init_cfg: Initialisation, in MMEngine's form. Without it convolutions
            start from a normal distribution of variance 2 / fan-out.

    Raises:
        ValueError: On an argument out of range; says what is valid.
        CheckpointError: On loading weights that are not this backbone's.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_size: int | Sequence[int] = 23,
        attention: str = 'LSKA',
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        norm_cfg: dict = dict(type='BN'),
        stage_norm_cfg: dict = dict(type='LN', eps=1e-6),
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        self.arch = _parse_arch(arch)
        self.attention = attention
        self.kernel_size = kernel_size
        self.out_indices = _parse_out_indices(out_indices, len(self.arch['depths']))
        self.num_stages = max(self.out_indices) + 1
        if not -1 <= frozen_stages < self.num_stages:
            raise ValueError(
                f'frozen_stages={frozen_stages} is out of range; the backbone '
                f'has stages 0 to {self.num_stages - 1}, -1 freezes none.'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        depths = self.arch['depths']
        kernel_sizes = _parse_kernel_size(kernel_size, len(depths))
        drop_path_rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        for i in range(self.num_stages):
            channels = self.arch['embed_dims'][i]
            patch_size, stride = (7, 4) if i == 0 else (3, 2)
            patch_embed = PatchEmbed(in_channels, channels, patch_size, stride, norm_cfg)
            blocks = ModuleList(
                Block(
                    channels,
                    kernel_sizes[i],
                    attention,
                    self.arch['ffn_ratios'][i],
                    drop_rate,
                    drop_path_rates[sum(depths[:i]) + j],
                    norm_cfg,
                    with_cp,
                )
                for j in range(depths[i])
            )
            self.add_module(f'patch_embed{i + 1}', patch_embed)
            self.add_module(f'block{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', build_norm_layer(stage_norm_cfg, channels)[1])
            in_channels = channels
        self.deployed = False
        if deploy:
            self.eval().switch_to_deploy()
        self._freeze_stages()

    def _stage(self, index: int) -> tuple[Any, ModuleList, nn.Module]:
        names = ('patch_embed', 'block', 'norm')
        return tuple(getattr(self, f'{name}{index + 1}') for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages in ``out_indices``, in that order.

        Args:
            x: Images (B, in_channels, H, W).

        Returns:
            (B, embed_dims[i], H / 2^(i + 2), W / 2^(i + 2)) for stage i, sizes
            rounded up.
        """
        if is_eager_cpu(x):
            x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i in range(self.num_stages):
            patch_embed, blocks, norm = self._stage(i)
            x = patch_embed(x)
            for block in blocks:
                x = block(x)
            x = _norm_channels(norm, x)
            outs.append(x)
        # Some heads ask for the ordinary layout: deformable convolutions, `view`.
        return tuple(outs[i].contiguous() for i in self.out_indices)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says, without one as the paper does."""
        if not self.init_cfg and not self.is_init:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    # Fan-out of one group, in weights: height * width * outputs.
                    fan_out = math.prod(module.kernel_size) * module.out_channels
                    nn.init.normal_(module.weight, 0, math.sqrt(2 * module.groups / fan_out))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        super().init_weights()

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold BatchNorms and layer scales into the convolutions, for inference.

        The outputs stay the same but for rounding. Done twice, nothing more
        happens. The state dict then is that of ``LSKAVAN(..., deploy=True)``.

        Raises:
            RuntimeError: In training mode, where batches have statistics of
                their own.
            TypeError: If ``norm_cfg`` is another norm than BatchNorm.
        """
        if self.deployed:
            return
        if self.training:
            raise RuntimeError('switch_to_deploy() is for inference; call eval() first.')
        for i in range(self.num_stages):
            patch_embed, blocks, _ = self._stage(i)
            fold(patch_embed.proj, after=affine(patch_embed.norm))
            patch_embed.norm = nn.Identity()
            for j, block in enumerate(blocks):
                blocks[j] = FusedBlock(block).eval()
        pack(self)
        self.deployed = True

    def _freeze_stages(self) -> None:
        for i in range(self.frozen_stages + 1):
            for module in self._stage(i):
                module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'LSKAVAN':
        """Switch between training and evaluation; what is frozen stays so."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Which layer a parameter is of, for layer-wise learning-rate decay.

        Called by mmpretrain's ``LearningRateDecayOptimWrapperConstructor``. The
        first patch embedding is layer 0, each block one more; later patch
        embeddings and the stage norms go with the block before them.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: What stands in front of the backbone's names there.

        Returns:
            The layer, and the number of layers; the last is all that follows
            the backbone.
        """
        depths = self.arch['depths'][: self.num_stages]
        num_layers = sum(depths) + 2
        match = re.fullmatch(
            r'(patch_embed|block|norm)(\d+)\.(?:(\d+)\.)?.+', param_name.removeprefix(prefix)
        )
        if not param_name.startswith(prefix) or match is None:
            return num_layers - 1, num_layers
        kind, stage, block = match[1], int(match[2]), match[3]
        if kind == 'block':
            return sum(depths[: stage - 1]) + int(block) + 1, num_layers
        return sum(depths[: stage - 1] if kind == 'patch_embed' else depths[:stage]), num_layers

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        adapt_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _parse_arch(arch: str | dict) -> dict:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch={arch!r} is unknown; valid: {", ".join(ARCHS)}, '
                'or a dict of embed_dims, depths and ffn_ratios.'
            )
        return ARCHS[arch]
    keys = list(ARCHS['tiny'])
    if set(arch) != set(keys):
        raise ValueError(f'arch needs the keys {keys}, got {sorted(arch)}.')
    if len({len(arch[key]) for key in keys}) != 1 or not arch['depths']:
        lengths = ', '.join(f'{key}: {len(arch[key])}' for key in keys)
        raise ValueError(f'arch needs lists of equal length, a value a stage; got {lengths}.')
    return dict(arch)


def _parse_kernel_size(kernel_size: int | Sequence[int], num_stages: int) -> Sequence[int]:
    if not isinstance(kernel_size, (list, tuple)):
        return [kernel_size] * num_stages  # type: ignore[list-item]
    if len(kernel_size) != num_stages:
        raise ValueError(
            f'kernel_size={list(kernel_size)} has {len(kernel_size)} values, the arch has '
            f'{num_stages} stages; give one for all stages, or one a stage.'
        )
    return kernel_size


def _parse_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    valid = range(-num_stages, num_stages)
    if not out_indices or any(i not in valid for i in out_indices):
        raise ValueError(
            f'out_indices={tuple(out_indices)} is out of range; the '
            f'{num_stages} stages are 0 to {num_stages - 1}.'
        )
    return tuple(i % num_stages for i in out_indices)
