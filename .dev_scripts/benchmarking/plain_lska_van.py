"""Plain LSKA-VAN classifier: the yardstick for outputs and for speed.

Written for this project from the architecture in arXiv:2309.01439, one
`nn.Conv2d` per kernel and nothing else. Parameter names follow the layout of
the published ImageNet checkpoints (`layout.json`), so

    model = plain_lska_van('tiny', 23)
    model.load_state_dict({k: torch.as_tensor(v)
                           for k, v in build_state('tiny', 23).items()})

reproduces `outputs.npz`. It is a baseline to be beaten: it is slow on
purpose of staying plain, and it is not a design to follow.
"""

import torch
from torch import nn

WIDTHS = dict(tiny=(32, 64, 160, 256), small=(64, 128, 320, 512), base=(64, 128, 320, 512))
DEPTHS = dict(tiny=(3, 3, 5, 2), small=(2, 2, 4, 2), base=(3, 3, 12, 3))
RATIOS = (8, 8, 4, 4)


def split_kernel(k):
    """Lengths and dilation of the two 1-D pairs that span `k` pixels."""
    dilation = 2 if k <= 11 else 3
    return 2 * dilation - 1, k // dilation, dilation


def depthwise(dim, kernel, dilation=1):
    pad = tuple(dilation * (n - 1) // 2 for n in kernel)
    return nn.Conv2d(dim, dim, kernel, padding=pad, dilation=dilation, groups=dim)


class LSKA(nn.Module):
    def __init__(self, dim, k):
        super().__init__()
        local, far, dilation = split_kernel(k)
        self.conv0h = depthwise(dim, (1, local))
        self.conv0v = depthwise(dim, (local, 1))
        self.conv_spatial_h = depthwise(dim, (1, far), dilation)
        self.conv_spatial_v = depthwise(dim, (far, 1), dilation)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        u = x.clone()
        attn = self.conv0v(self.conv0h(x))
        attn = self.conv_spatial_v(self.conv_spatial_h(attn))
        return u * self.conv1(attn)


class Attention(nn.Module):
    def __init__(self, dim, k):
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LSKA(dim, k)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        shortcut = x.clone()
        x = self.activation(self.proj_1(x))
        return self.proj_2(self.spatial_gating_unit(x)) + shortcut


class DWConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = depthwise(dim, (3, 3))

    def forward(self, x):
        return self.dwconv(x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim, k, ratio):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim, k)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x):
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        x = x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    def __init__(self, in_dim, dim, patch, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch, stride, patch // 2)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.norm(self.proj(x))


class PlainLSKAVAN(nn.Module):
    def __init__(self, widths, depths, k, num_classes=1000):
        super().__init__()
        in_dim = 3
        for i, (dim, depth) in enumerate(zip(widths, depths), start=1):
            patch, stride = (7, 4) if i == 1 else (3, 2)
            self.add_module(f'patch_embed{i}', PatchEmbed(in_dim, dim, patch, stride))
            self.add_module(
                f'block{i}', nn.ModuleList(Block(dim, k, RATIOS[i - 1]) for _ in range(depth))
            )
            self.add_module(f'norm{i}', nn.LayerNorm(dim, eps=1e-6))
            in_dim = dim
        self.head = nn.Linear(in_dim, num_classes)

    def features(self, x):
        """(B, 3, H, W) -> one (B, C_i, H / 2^(i+1), W / 2^(i+1)) per stage."""
        out = []
        for i in range(1, 5):
            x = getattr(self, f'patch_embed{i}')(x)
            for block in getattr(self, f'block{i}'):
                x = block(x)
            b, c, h, w = x.shape
            tokens = getattr(self, f'norm{i}')(x.flatten(2).transpose(1, 2))
            x = tokens.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()
            out.append(x)
        return tuple(out)

    def forward(self, x):
        return self.head(self.features(x)[-1].mean(dim=(2, 3)))


def plain_lska_van(arch, k, num_classes=1000):
    return PlainLSKAVAN(WIDTHS[arch], DEPTHS[arch], k, num_classes)
