"""The branches of a block, with other functions for their convolutions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .gradients import gelu

Convolve = Callable[[Any, Tensor], Tensor]  # a module and its map (B, C, H, W)


class Way(NamedTuple):
    """Functions for convolutions, and methods that compute each kind of module with them."""

    depthwise: Convolve
    conv1x1: Convolve
    conv_of_gelu: Convolve  # 1 x 1, of GELU(x)

    def gate(self, gate: Any, x: Tensor) -> Tensor:
        """``x * conv1(depthwise(x))``."""
        *convs, last = gate
        out = x
        for conv in convs:
            out = self.depthwise(conv, out)
        return x * self.conv1x1(last, out)

    def gated(self, branch: Any, x: Tensor) -> Tensor:
        """All but the last convolution of `attention`."""
        return self.gate(branch.spatial_gating_unit, gelu(self.conv1x1(branch.proj_1, x)))

    def attention(self, branch: Any, x: Tensor) -> Tensor:
        """``x + proj_2(gate(gelu(proj_1(x))))``."""
        return x + self.conv1x1(branch.proj_2, self.gated(branch, x))

    def mlp(self, branch: Any, x: Tensor) -> Tensor:
        """``fc2(gelu(dwconv(fc1(x))))``."""
        hidden = self.depthwise(branch.dwconv, self.conv1x1(branch.fc1, x))
        return self.conv_of_gelu(branch.fc2, hidden)

    def deployed(self, block: Any, x: Tensor) -> Tensor:
        """What `FusedBlock` computes."""
        x = x * block.shortcut + self.conv1x1(block.attn.proj_2, self.gated(block.attn, x))
        return x + self.mlp(block.mlp, x)
