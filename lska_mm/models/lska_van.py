"""LSKA-VAN: the Visual Attention Network with large separable kernels.

Network from `Visual Attention Network <https://arxiv.org/abs/2202.09741>`_ (Guo
et al., 2022), attention from arXiv:2309.01439 (see `lska`). Module names are
those in the ImageNet weights of the latter's authors; arguments follow OpenMMLab's
backbones.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..fast.door import layout_of, preferred_layout
from ..weights.match import adapt_state_dict
from .archs import one_each, parse_arch, parse_out_indices
from .block import Block, PatchEmbed, normalizes_last_axis
from .deploy import fold_stages


@MODELS.register_module()
class LSKAVAN(BaseModule):
    """LSKA-VAN backbone.

    In a config of mmdet, mmseg or mmpretrain:

        custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
        model = dict(backbone=dict(type='LSKAVAN', arch='tiny', out_indices=(0, 1, 2, 3)))

    Weights in any published layout load without conversion; weights of another
    network, size or kernel are refused (see `lska_mm.weights.names`).

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or the names of
            mmpretrain and VAN's authors, ``'t'`` to ``'l'`` and ``'b0'`` to ``'b6'``;
            or a dict of the lists ``embed_dims``, ``depths``, ``ffn_ratios``, one value
            per stage.
        kernel_size: Side of the attention's receptive field, in pixels, or a
            list with one value per stage: 7, 11, 23, 35 and 53 were published,
            see `split_kernel` for others.
        attention: The kind of gate, see `LSKA`.
        in_channels: Channels of the image.
        drop_rate: Dropout probability inside the MLPs.
        drop_path_rate: Probability of skipping a branch in the last block; it
            rises linearly from 0 in the first.
        out_indices: Stages whose maps are returned, negative from the end.
            Stages after the last of these are not built.
        frozen_stages: Stages 0 up to this one neither train nor update their
            statistics; -1 freezes none.
        norm_eval: Keep BatchNorm's statistics fixed in training.
        with_cp: Recompute the branches in the backward pass to save memory.
        deploy: Build the result of `switch_to_deploy`, to load its weights.
        patch_sizes: Kernel size of each patch embedding.
        norm_cfg: Norms of patch embeddings and blocks.
        stage_norm_cfg: Norm at the end of each stage.
        init_cfg: Initialization, in MMEngine's form. Without it convolutions
            start from a normal distribution of variance 2 / fan-out.

    Raises:
        ValueError: If an argument is out of range; says what is valid.
        CheckpointError: If loaded weights are not this backbone's.
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
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        norm_cfg: dict = dict(type='BN'),
        stage_norm_cfg: dict = dict(type='LN', eps=1e-6),
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        self.arch = self.arch_settings = parse_arch(arch)  # the second is mmpretrain's name
        self.attention = attention
        self.kernel_size = kernel_size
        self.out_indices = parse_out_indices(out_indices, len(self.arch['depths']))
        self.num_stages = max(self.out_indices) + 1
        sizes = {**self.arch, 'in_channels': [in_channels], 'patch_sizes': patch_sizes}
        for name in ('embed_dims', 'ffn_ratios', 'in_channels', 'patch_sizes'):
            if min(sizes[name]) <= 0:
                raise ValueError(f'{name}={sizes[name]} must be positive.')
        if len(patch_sizes) < self.num_stages:
            raise ValueError(
                f'patch_sizes={patch_sizes} needs {self.num_stages} values, by stage.'
            )
        if not -1 <= frozen_stages < self.num_stages:
            raise ValueError(
                f'frozen_stages={frozen_stages} is out of range; the backbone '
                f'has stages 0 to {self.num_stages - 1}; -1 freezes none.'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._strict: bool | None = None  # see `_strictly`

        depths = self.arch['depths']
        kernel_sizes = one_each('kernel_size', kernel_size, len(depths))
        drop_path_rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        for i in range(self.num_stages):
            channels = self.arch['embed_dims'][i]
            stride = 4 if i == 0 else 2
            patch_embed = PatchEmbed(in_channels, channels, patch_sizes[i], stride, norm_cfg)
            ratio, rates = self.arch['ffn_ratios'][i], drop_path_rates[sum(depths[:i]) :]
            blocks = ModuleList(
                Block(
                    channels, kernel_sizes[i], attention, ratio, drop_rate, rate, norm_cfg, with_cp
                )
                for rate in rates[: depths[i]]
            )
            self.add_module(f'patch_embed{i + 1}', patch_embed)
            self.add_module(f'block{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', build_norm_layer(stage_norm_cfg, channels)[1])
            in_channels = channels
        self.norms_last_axis = normalizes_last_axis(getattr(self, f'norm{i + 1}'), channels)
        self.deployed = False
        if deploy:
            self.switch_to_deploy()
        self._freeze_stages()

    def _stage(self, index: int) -> tuple[Any, ModuleList, nn.Module]:
        names = ('patch_embed', 'block', 'norm')
        return tuple(getattr(self, f'{name}{index + 1}') for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the stages in ``out_indices``, in that order.

        Args:
            x: Images (B, in_channels, H, W).

        Returns:
            (B, embed_dims[i], H / 2^(i + 2), W / 2^(i + 2)) for stage i, sizes
            rounded up; in channels_last if ``x`` is.
        """
        layout, fastest = layout_of(x), preferred_layout(x, self)
        outs = []
        for i in range(self.num_stages):
            patch_embed, blocks, norm = self._stage(i)
            x = patch_embed(x).contiguous(memory_format=fastest)
            for block in blocks:
                x = block(x)
            if self.norms_last_axis:
                x = norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
                x = x.contiguous(memory_format=fastest)
            else:
                x = norm(x)
            outs.append(x)
        return tuple(outs[i].contiguous(memory_format=layout) for i in self.out_indices)

    def init_weights(self) -> None:
        """Initialize as in ``init_cfg``, by default as in the paper."""
        if not self.init_cfg and not self.is_init:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    # Fan-out of one group, in weights: height * width * outputs.
                    fan_out = math.prod(module.kernel_size) * module.out_channels
                    nn.init.normal_(module.weight, 0, math.sqrt(2 * module.groups / fan_out))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        with self._strictly(True):  # MMEngine's `Pretrained` would only warn
            super().init_weights()

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold BatchNorms and layer scales into the convolutions, for inference.

        The outputs are the same as in evaluation except for rounding. A second call does
        nothing. The state dict becomes that of ``LSKAVAN(..., deploy=True)``.

        Raises:
            TypeError: If a norm is not a BatchNorm with running statistics, or a part was
                modified; names it, and changes nothing.
        """
        if self.deployed:
            return
        fold_stages([self._stage(i)[:2] for i in range(self.num_stages)])
        self.eval()
        self.deployed = True

    def _freeze_stages(self) -> None:
        for i in range(self.frozen_stages + 1):
            for module in self._stage(i):
                module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'LSKAVAN':
        """Switch between training and evaluation mode; frozen stages stay frozen."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter, for layer-wise learning-rate decay.

        Takes a name in the whole model, and the prefix of the backbone's names there;
        returns the layer, and the number of layers. The first patch embedding is
        layer 0, each block one more; later patch embeddings and the stage norms belong
        to the block before them. Everything after the backbone is the last layer.
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

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load tensors in any published layout; with ``strict=False`` a part of them."""
        with self._strictly(strict):
            return super().load_state_dict(state_dict, strict, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        file = local_metadata.get('file')  # set by `from_file`
        strict = file is not None if self._strict is None else self._strict
        adapt_state_dict(self, state_dict, prefix, strict, file or '')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    @contextmanager
    def _strictly(self, strict: bool) -> Iterator[None]:
        """Set whether to refuse tensors that are not exactly this backbone's."""
        self._strict = strict
        try:
            yield
        finally:
            self._strict = None
