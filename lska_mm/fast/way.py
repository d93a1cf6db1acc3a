"""The branches of a block; each way to compute them overrides their convolutions."""

from typing import Any

from torch import Tensor

from .gradients import gelu


class Way:
    """Functions of a module and its map (B, C, H, W), each of a kind that `door` knows."""

    def gate(self, gate: Any, x: Tensor) -> Tensor:
        """``x * conv1(depthwise(x))``."""
        *convs, last = gate
        out = x
        for conv in convs:
            out = self.depthwise(conv, out)
        return self.scaled(x, self.conv1x1(last, out))

    def gated(self, branch: Any, x: Tensor) -> Tensor:
        """All but the last convolution of `attention`."""
        return self.gate(branch.spatial_gating_unit, self.gelu_of_conv(branch.proj_1, x))

    def attention(self, branch: Any, x: Tensor) -> Tensor:
        """``x + proj_2(gate(gelu(proj_1(x))))``."""
        return self.plus_conv(x, branch.proj_2, self.gated(branch, x))

    def mlp(self, branch: Any, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """``fc2(gelu(dwconv(fc1(x))))``, and plus ``summand`` if there is one."""
        hidden = self.depthwise(branch.dwconv, self.conv1x1(branch.fc1, x))
        out = self.conv_of_gelu(branch.fc2, hidden)
        return out if summand is None else summand + out

    def deployed(self, block: Any, x: Tensor) -> Tensor:
        """What `FusedBlock` computes."""
        x = self.plus_conv(x * block.shortcut, block.attn.proj_2, self.gated(block.attn, x))
        return self.mlp(block.mlp, x, x)

    # Their parts, in PyTorch's operators

    def depthwise(self, conv: Any, x: Tensor) -> Tensor:
        return conv(x)

    def conv1x1(self, conv: Any, x: Tensor) -> Tensor:
        return conv(x)

    def gelu_of_conv(self, conv: Any, x: Tensor) -> Tensor:
        return gelu(self.conv1x1(conv, x))

    def conv_of_gelu(self, conv: Any, x: Tensor) -> Tensor:
        return self.conv1x1(conv, gelu(x))

    def plus_conv(self, summand: Tensor, conv: Any, x: Tensor) -> Tensor:
        return summand + self.conv1x1(conv, x)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor
