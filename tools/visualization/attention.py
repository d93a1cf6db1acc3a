"""Draw the large-kernel gates of a trained model for an image.

    python tools/visualization/attention.py CONFIG CHECKPOINT IMAGE --out FILE.png [--block 0]

A gate multiplies each pixel of each channel by a factor that it computes from a
neighborhood of kernel_size x kernel_size. The picture shows the factor's absolute value,
averaged over the channels, relative to its mean over the image: 1 is the average, 2 is
amplified twice as much. There is a panel for each stage, counted from 0 as in out_indices,
with its last block or the one selected by --block. Each has its own scale: compare the
numbers, not the colors, of two panels. The sizes of the maps and the absolute factors are
printed.

The config may be that of a detector, a segmentor or a classifier with the backbone
LSKAVAN; the image is loaded with its test pipeline. The checkpoint may be of any model
with the same backbone.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

from backbones import device, load_backbone, read
from lska_mm import LSKA, LSKAVAN
from lska_mm.cli import (
    add_cfg_options,
    make_parser,
    markdown,
    normalize,
    png,
    read_config,
    report_errors,
)
from lska_mm.weights.names import CheckpointError

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


class GateMap(NamedTuple):
    """The factor of one gate: stage and block, counted from 0, and the map (H', W')."""

    stage: int
    block: int
    kernel_size: int
    factor: Tensor


def gate_maps(backbone: LSKAVAN, image: Tensor, block: int = -1) -> list[GateMap]:
    """Return the absolute factors, averaged over channels, of one gate in each stage.

    Args:
        backbone: In evaluation mode, deployed or not.
        image: One normalized image (1, C, H, W).
        block: Index of the block in its stage, negative from the end.

    Raises:
        ValueError: If a stage has no such block.
    """
    maps, handles = [], []

    def keep(stage: int, index: int, gate: LSKA) -> None:
        # A copy: without gradients the product reuses the factor's memory.
        def hook(module, inputs, output):
            maps.append(GateMap(stage, index, gate.kernel_size, output.abs().mean(1)[0].cpu()))

        handles.append(gate.conv1.register_forward_hook(hook))

    try:
        for stage in range(backbone.num_stages):
            blocks = getattr(backbone, f'block{stage + 1}')
            if not -len(blocks) <= block < len(blocks):
                raise ValueError(f'Stage {stage} has blocks 0 to {len(blocks) - 1}, not {block}.')
            index = block % len(blocks)
            keep(stage, index, blocks[index].attn.spatial_gating_unit)
        with torch.no_grad():
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def make_table(maps: list[GateMap]) -> str:
    """Markdown: a row for each gate, with the absolute factors."""
    head = ['stage', 'block', 'kernel size', 'map', 'mean factor', 'lowest', 'highest']
    rows = [head]
    for stage, block, size, factor in maps:
        height, width = factor.shape
        values = [f'{value:.3f}' for value in (factor.mean(), factor.min(), factor.max())]
        rows.append([str(stage), str(block), str(size), f'{height} x {width}', *values])
    return markdown(rows)


def plot(image: Tensor, maps: list[GateMap], title: str, path: Path) -> None:
    """Draw the image (C, H, W), in color or the mean of its bands, and a panel for each gate.

    Each has its own color bar.
    """
    bands, height, width = image.shape
    in_colors = bands == 3 and image.dtype == torch.uint8
    picture = image.flip(0).permute(1, 2, 0) if in_colors else image.float().mean(0)
    panels, ratio = len(maps) + 1, max(width / height, 0.35)
    # Side by side; for a wide image one above the other.
    rows, columns, side = (1, panels, 2.6) if ratio < 2 else (panels, 1, 9.0 / ratio)
    figsize = ((side * ratio + 0.8) * columns, (side + 0.4) * rows + 0.7)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=figsize, layout='compressed')
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(textwrap.fill(title, int(12 * figsize[0])), fontsize=10)
    axes[0].imshow(picture, cmap='gray')  # only used for the mean
    axes[0].set_title(f'mean of\n{bands} bands' if bands > 3 else 'image', fontsize=9)
    for axis, gate in zip(axes[1:], maps):
        relative = (gate.factor / gate.factor.mean()).numpy()
        low, high = np.quantile(relative, (0.005, 0.995))
        drawn = axis.imshow(
            relative, cmap='viridis', vmin=low, vmax=high, extent=(0, width, height, 0)
        )
        block = f'stage {gate.stage}, block {gate.block}'
        axis.set_title(f'{block}\nkernel {gate.kernel_size}', fontsize=9)
        bar = figure.colorbar(drawn, ax=axis, extend='both', extendfrac=0.03, pad=0.02)
        bar.locator = MaxNLocator(5)
        bar.ax.tick_params(labelsize=8)
        bar.set_label('factor / its mean', fontsize=8)
    for axis in axes:
        axis.axis('off')
    figure.savefig(path, dpi=110, bbox_inches='tight')
    plt.close(figure)


def draw(args: argparse.Namespace) -> str:
    """Write the picture; return its title and the table.

    Raises:
        CheckpointError, OSError, ValueError: On bad input.
    """
    cfg = read_config(args.config, args.cfg_options)
    backbone, weights = load_backbone(cfg, args.checkpoint)
    if not isinstance(backbone, LSKAVAN):
        raise ValueError(f'The backbone is {type(backbone).__name__}; expected LSKAVAN.')
    image = read(cfg, args.image)['inputs']
    inputs = normalize(image[None], cfg).to(args.device)
    maps = gate_maps(backbone.to(args.device), inputs, args.block)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    title = f'{Path(args.config).stem}, {weights}'
    plot(image, maps, title, args.out)
    return f'{title}\n\n{make_table(maps)}'


@report_errors(CheckpointError, OSError, RuntimeError, ValueError)
def main() -> None:
    parser = make_parser('Draw the gates for an image')
    parser.add_argument('config', help='config of a model with the backbone LSKAVAN')
    parser.add_argument('checkpoint', help='checkpoint with its backbone')
    parser.add_argument('image', type=Path, help='an image')
    parser.add_argument('--out', type=png, required=True, help='file to write, .png')
    parser.add_argument('--block', type=int, default=-1,
                        help='block of each stage, negative from the end')  # fmt: skip
    parser.add_argument('--device', type=device, default='cpu')
    add_cfg_options(parser)
    args = parser.parse_args()
    print(f'{draw(args)}\nwritten to {args.out}')


if __name__ == '__main__':
    sys.exit(main())
