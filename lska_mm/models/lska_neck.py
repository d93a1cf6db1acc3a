"""VAN's attention block behind the neck of any detector or segmentor."""

from collections.abc import Sequence

from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor

from ..fast.door import layout_of, preferred_layout
from .archs import one_each
from .lska import Attention


@MODELS.register_module()
class LSKANeck(BaseModule):
    """The attention of a VAN block, with separate weights for each map of a neck.

    Use it behind another neck, in a list:

        neck=[dict(type='FPN', ...), dict(type='LSKANeck', in_channels=256, num_outs=5)]

    Args:
        in_channels: Channels of all maps, or a list with one value per map.
        num_outs: Number of maps.
        kernel_size: Side of the receptive field, in pixels of the map.
        attention: The kind of gate, see `LSKA`.
        init_cfg: Initialization, in MMEngine's form; by default PyTorch's.

    Raises:
        ValueError: If the maps do not match the arguments; see also `LSKA`.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_outs: int,
        kernel_size: int = 23,
        attention: str = 'LSKA',
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        self.in_channels = one_each('in_channels', in_channels, num_outs, 'maps (num_outs)')
        self.num_outs = num_outs
        self.blocks = ModuleList(
            Attention(channels, kernel_size, attention) for channels in self.in_channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Transform maps (B, in_channels[i], H_i, W_i) to maps of the same shapes."""
        if len(inputs) != self.num_outs:
            raise ValueError(f'LSKANeck expects num_outs={self.num_outs} maps, got {len(inputs)}.')
        outs = []
        for x, block in zip(inputs, self.blocks):
            layout = layout_of(x)
            x = x.contiguous(memory_format=preferred_layout(x, self))
            outs.append(block(x).contiguous(memory_format=layout))
        return tuple(outs)
