"""Draw how LSKA makes a large kernel out of four 1-D ones.

    python .dev_scripts/draw_lska.py [--kernel-size 23] [--out docs/images] [--png]

writes lska_light.svg and lska_dark.svg, for pages with a light and a dark background, and
with --png the same as PNG. The taps are those of the gate's convolutions: each is given
weights of 1 and one bright pixel, and what comes out is drawn.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from lska_mm import LSKA

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.patches import FancyBboxPatch

THEMES = dict(
    light=dict(
        text='#1f2328', quiet='#59636e', paper='#ffffff', cell='#e8ebef',
        local='#0969da', far='#bc4c00', both='#6639ba',
    ),
    dark=dict(
        text='#f0f6fc', quiet='#9198a1', paper='#0d1117', cell='#262c36',
        local='#58a6ff', far='#f0883e', both='#b392f0',
    ),
)  # fmt: skip
# In points, so that the numbers in the files are short.
WIDTH, HEIGHT = 576, 342
SMALL, LARGE = 138, 230  # sides of a panel
MARGIN, COLUMN_GAP, ROW_GAP = 6, 24, 30
TIMES = '\N{MULTIPLICATION SIGN}'


def impulse_responses(kernel_size: int) -> list[tuple[nn.Conv2d, Tensor, Tensor]]:
    """Of each depth-wise convolution: itself, its taps, and the taps of all up to it.

    Taps are maps (kernel_size, kernel_size) of how many ways lead from the center to a pixel.
    """
    gate = LSKA(1, kernel_size).requires_grad_(False)
    pixel = torch.zeros(1, 1, kernel_size, kernel_size)
    pixel[..., kernel_size // 2, kernel_size // 2] = 1
    seen, found = pixel, []
    for conv in [conv for conv in gate if conv.kernel_size != (1, 1)]:
        conv.weight.fill_(1)
        conv.bias.zero_()
        seen = conv(seen)
        found.append((conv, conv(pixel)[0, 0], seen[0, 0]))
    return found


def mix(color: str, other: str, share: float) -> str:
    """A color with so much of another."""
    return to_hex([(1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other))])


def draw_cells(figure: Figure, left: int, bottom: int, side: int, colors: list[list[str]]) -> None:
    """A square of cells in their colors."""
    axes = figure.add_axes((left / WIDTH, bottom / HEIGHT, side / WIDTH, side / HEIGHT))
    k = len(colors)
    cells = defaultdict(list)
    for row in range(k):
        for column in range(k):
            cells[colors[row][column]].append((column, row))
    cell = FancyBboxPatch((-4, -4), 8, 8, boxstyle='round,pad=0,rounding_size=1.6').get_path()
    for color, places in cells.items():
        axes.plot(*zip(*places), linestyle='', marker=MarkerStyle(cell), color=color,
                  markersize=0.84 * side / k, markeredgewidth=0)  # fmt: skip
    axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5))
    axes.axis('off')


def draw(kernel_size: int, theme: dict[str, str]) -> Figure:
    """Four panels of 1-D kernels, and one of what they are together."""
    figure = plt.figure(figsize=(WIDTH / 72, HEIGHT / 72))

    def write(x: float, y: float, text: str, size: float, color: str, weight='normal') -> None:
        figure.text(x / WIDTH, y / HEIGHT, text, fontsize=size, color=theme[color],
                    ha='center', va='center', fontweight=weight)  # fmt: skip

    steps = impulse_responses(kernel_size)
    lefts = (MARGIN, MARGIN + SMALL + COLUMN_GAP)
    bottoms = (MARGIN + SMALL + ROW_GAP, MARGIN)
    for i, (conv, taps, seen) in enumerate(steps):
        (height, width), apart = conv.kernel_size, max(conv.dilation)
        color = theme['local' if apart == 1 else 'far']
        tint = mix(theme['paper'], color, 0.28)
        colors = [
            [color if tap else tint if reached else theme['cell'] for tap, reached in zip(*rows)]
            for rows in zip(taps.tolist(), seen.tolist())
        ]
        left, bottom = lefts[i % 2], bottoms[i // 2]
        draw_cells(figure, left, bottom, SMALL, colors)
        name = f'{height} {TIMES} {width}' + (f', {apart} pixels apart' if apart > 1 else '')
        write(left + SMALL / 2, bottom + SMALL + 11, name, 10.5, 'text')
    middle = bottoms[0] - ROW_GAP / 2
    for y in (bottoms[0] + SMALL / 2, middle, bottoms[1] + SMALL / 2):
        write(lefts[1] - COLUMN_GAP / 2, y, '\N{ASTERISK OPERATOR}', 15, 'quiet')
    left, bottom = WIDTH - LARGE - MARGIN, int(middle - LARGE / 2) + 6
    write((lefts[1] + SMALL + left) / 2, middle, '=', 18, 'quiet')

    ways = steps[-1][-1]
    counts = ways.unique().tolist()
    shades = {
        count: mix(theme['paper'], theme['both'], (i + 1) / len(counts))
        for i, count in enumerate(counts)
    }
    colors = [[shades[count] for count in row] for row in ways.tolist()]
    draw_cells(figure, left, bottom, LARGE, colors)
    center = left + LARGE / 2
    write(center, bottom + LARGE + 16, f'{kernel_size} {TIMES} {kernel_size}', 15, 'text', 'bold')
    weights = sum(conv.weight.numel() for conv, *_ in steps)
    write(center, bottom - 13, f'{weights} weights per channel, not {kernel_size**2}', 10.5,
          'quiet')  # fmt: skip
    write(center, bottom - 29, 'faint: what the steps so far see', 10.5, 'quiet')
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw how LSKA makes a large kernel')
    parser.add_argument('--kernel-size', type=int, default=23)
    parser.add_argument('--out', type=Path, default=Path('docs/images'), help='folder')
    parser.add_argument('--png', action='store_true', help='write PNG as well')
    args = parser.parse_args()
    # The same file from the same kernels: no date, no random names.
    plt.rcParams.update({'svg.fonttype': 'path', 'svg.hashsalt': 'lska'})
    args.out.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        figure = draw(args.kernel_size, theme)
        path = args.out / f'lska_{name}.svg'
        figure.savefig(path, metadata=dict(Date=None, Creator=None), transparent=True)
        if args.png:
            figure.savefig(path.with_suffix('.png'), dpi=100, facecolor=theme['paper'])
        plt.close(figure)
        print(f'written to {path}')


if __name__ == '__main__':
    main()
