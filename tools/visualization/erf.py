"""Measure and draw the effective receptive fields of backbones.

    python tools/visualization/erf.py --images DIR --out erf.png
        --model CONFIG [CHECKPOINT] [--model CONFIG [CHECKPOINT] ... | --kernel-sizes 7 23 53]

The field is the contribution of each pixel of an image to the center of the last
map: the gradient of the center's positive values, summed over channels, with respect
to the image. Negative gradients count as zero, the image's channels are summed, and
images are averaged, as in RepLKNet (arXiv:2203.06717). Only positive values are used
because the channels of a final LayerNorm sum to a constant, whose gradient is zero.

Any toolbox's config with a backbone that returns maps can be used, with a checkpoint
of any model with the same backbone. Without one the weights are random, and the
picture says so. Images, with any number of bands, are loaded with the config's test
pipeline. There is a panel for each model, all on one scale: the contribution relative
to the largest one, logarithmic. The squares are the smallest ones around the center
that contain 20, 50 and 99 % of it; their sides, and their shares of the image's area,
are printed as a Markdown table. If even the largest is small, the center is also
drawn enlarged.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from backbones import device, load_backbone, read
from lska_mm import LSKA, cli
from lska_mm.weights.names import CheckpointError

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

SHARES = (0.2, 0.5, 0.99)
COLORS = ('#ffffff', '#00e5ff', '#7cff4f')  # of the squares
NARROW = 0.2  # of the image's side; a narrower field is also drawn enlarged
FLOOR = 1e-4  # of the largest contribution; smaller ones look the same
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


# --- Measurement ---------------------------------------------------------------


def effective_receptive_field(backbone: nn.Module, images: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the contribution of each pixel to the center of the backbone's last map.

    Args:
        backbone: Returns a map (B, C', H', W') or several, the last one last;
            in evaluation mode.
        images: Images (C, H, W) of one size, normalized for the backbone.

    Returns:
        Nonnegative contributions (H, W), averaged over the images.

    Raises:
        ValueError: If the backbone does not return a map, or the center of the map
            does not lie over the center of the image.
    """
    total = torch.zeros(images[0].shape[1:], dtype=torch.float64)
    for image in images:
        image = image[None].detach().requires_grad_()
        with torch.enable_grad():
            last = backbone(image)
            while isinstance(last, tuple | list):
                last = last[-1]
            if last.dim() != 4:
                raise ValueError(
                    f'The {type(backbone).__name__} returns {tuple(last.shape)}, expected a map '
                    '(B, C, H, W).'
                )
            _check_center(image.shape[2:], last.shape[2:])
            center = last[0, :, last.shape[2] // 2, last.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(center, image)
        total += gradient[0].relu().sum(0).cpu().double()
    return total / len(images)


def _check_center(image: torch.Size, last: torch.Size) -> None:
    """Check that point (H' // 2, W' // 2) of the map is over pixel (H // 2, W // 2)."""
    for size, cells in zip(image, last):
        stride = _stride(size, cells)
        if cells // 2 * stride != size // 2:
            raise ValueError(
                f'The last map of {size} pixels has {cells} points, and the middle one is over '
                f'pixel {cells // 2 * stride}, not {size // 2}. Use a multiple of {2 * stride} '
                'pixels.'
            )


def _stride(size: int, cells: int) -> int:
    """Return the stride of a map: if possible a power of two, as in nearly all backbones."""
    power = 2 ** round(math.log2(size / cells))
    exact, rest = divmod(size, cells)
    return exact if rest == 0 and -(-size // power) != cells else power


class Square(NamedTuple):
    """A square around the center: its side in pixels, and its share of the image's area."""

    side: int
    area: float


def contribution_squares(erf: Tensor, shares: Sequence[float] = SHARES) -> list[Square]:
    """Return the smallest centered squares that contain ``shares`` of contributions (H, W).

    Their sides are odd, around pixel (H // 2, W // 2), unless cut off by the image.

    Raises:
        ValueError: If the sum is zero or NaN.
    """
    height, width = erf.shape
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    held = torch.bincount(distance.flatten(), weights=erf.double().flatten()).cumsum(0)
    if not held[-1] > 0:
        raise ValueError(
            f'The contributions of the pixels to the center of the last map sum to '
            f'{held[-1]:.0f}, expected a positive number.'
        )
    # Minus a rounding error, so that a share of 1 is reached.
    wanted = torch.as_tensor(shares, dtype=torch.float64) * held[-1] * (1 - 1e-9)
    squares = []
    for radius in torch.searchsorted(held, wanted).tolist():
        sides = [min(2 * radius + 1, n) for n in (height, width)]
        squares.append(Square(max(sides), sides[0] * sides[1] / (height * width)))
    return squares


# --- Images ------------------------------------------


def find_images(folder: Path, number: int) -> list[Path]:
    """Return up to ``number`` images below a folder, evenly spaced in their sorted names.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'No folder {folder}; --images expects a folder of images.')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f'No image ({" ".join(SUFFIXES)}) in {folder}.')
    steps = np.linspace(0, len(paths) - 1, min(number, len(paths)))
    return [paths[i] for i in steps.round().astype(int)]


def read_center(cfg: Config, path: Path, size: tuple[int, int]) -> Tensor:
    """Load an image with the config's pipeline, and return its resized center (C, *size)."""
    image = read(cfg, path, same_size=True)['img']
    bands = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    scale = min(n / wanted for n, wanted in zip(bands.shape[1:], size))
    height, width = (max(1, round(scale * wanted)) for wanted in size)
    top, left = (bands.shape[1] - height) // 2, (bands.shape[2] - width) // 2
    center = bands[:, top : top + height, left : left + width]
    resized = [mmcv.imresize(band, size[::-1], interpolation='area') for band in center]
    return torch.as_tensor(np.stack(resized))


# --- Table and picture ---------------------------------------------------------


class Field(NamedTuple):
    """A row of the table and a panel of the picture."""

    name: str
    kernel_size: str
    weights: str
    erf: Tensor
    squares: list[Square]


def kernel_sizes(backbone: nn.Module) -> str:
    """Return the kernel sizes of the gates in a backbone, in order; may be empty."""
    gates = (module for module in backbone.modules() if isinstance(module, LSKA))
    return ', '.join(dict.fromkeys(str(gate.kernel_size) for gate in gates))


def make_table(fields: list[Field]) -> str:
    """Markdown: a row for each model; sides in pixels, shares of the image's area in brackets."""
    rows = [['model', 'kernel size', 'weights', *(f'{share:.0%} in' for share in SHARES)]]
    for field in fields:
        cells = [f'{side} ({area:.1%})' for side, area in field.squares]
        rows.append([field.name, field.kernel_size, field.weights, *cells])
    return cli.markdown(rows)


def draw(axis: plt.Axes, field: Field, reach: float) -> None:
    """Draw the field up to ``reach`` pixels from the center, and the squares."""
    height, width = field.erf.shape
    top, left = -(height // 2) - 0.5, -(width // 2) - 0.5  # the center is (0, 0)
    relative = (field.erf / field.erf.max()).clamp(min=FLOOR).numpy()
    extent = (left, left + width, top + height, top)
    axis.imshow(relative, extent=extent, norm=LogNorm(FLOOR, 1), cmap='inferno')
    outline = [withStroke(linewidth=3.5, foreground='black')]
    for (side, _), color, share in zip(field.squares, COLORS, SHARES):
        square = Rectangle((-side / 2, -side / 2), side, side, fill=False, color=color, lw=1.5)
        square.set(path_effects=outline, label=f'{share:.0%} in {side}')
        axis.add_patch(square)
    axis.set(xlim=(-reach, reach), ylim=(reach, -reach))


def plot(fields: list[Field], path: Path) -> None:
    """Draw a panel for each field, on a common scale, with the squares."""
    columns = min(len(fields), 4)
    rows = -(-len(fields) // columns)
    size = (3.4 * columns + 1, 4.1 * rows)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=size, layout='compressed', squeeze=False)
    for axis in axes.flat[len(fields) :]:
        axis.axis('off')
    for axis, field in zip(axes.flat, fields):
        half, largest = max(field.erf.shape) / 2, field.squares[-1].side
        draw(axis, field, 1.07 * half)
        if largest < NARROW * 2 * half:
            inset = axis.inset_axes((0.55, 0.55, 0.42, 0.42), xticks=[], yticks=[])
            draw(inset, field, 0.65 * largest)
            axis.indicate_inset_zoom(inset, edgecolor='white', alpha=1)
            inset.spines[:].set_color('white')
            note = f'narrow: almost nothing from\nbeyond {largest} x {largest} pixels'
            axis.text(0, 0.8 * half, note, color='white', fontsize=8, ha='center')
        kernel = f'kernel {field.kernel_size}, ' if field.kernel_size else ''
        title = [textwrap.fill(text, 42) for text in (field.name, kernel + field.weights)]
        axis.set_title('\n'.join(title), fontsize=9)
        axis.set_xlabel('pixels from the center', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(ncols=3, fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.14),
                    handlelength=1.2, columnspacing=1, frameon=False)  # fmt: skip
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, extend='min', extendfrac=0.03, aspect=30)
    bar.set_label('contribution / largest')
    figure.savefig(path, dpi=110, bbox_inches='tight')
    plt.close(figure)


def measure(args: argparse.Namespace) -> list[Field]:
    """Return a field for each model, or for each kernel size of a single model."""
    paths = find_images(args.images, args.num_images)
    print(f'{len(paths)} images of {args.images}, {args.size[0]} x {args.size[1]} pixels')
    fields = []
    for config, *checkpoint in args.model:
        for size in args.kernel_sizes or [None]:
            cfg = cli.read_config(config, args.cfg_options)
            if size is not None:
                if cfg.get('model', {}).get('backbone', {}).get('type') != 'LSKAVAN':
                    raise ValueError(f'--kernel-sizes is for LSKAVAN, {config} has none.')
                cfg.merge_from_dict({'model.backbone.kernel_size': size})
            torch.manual_seed(0)
            backbone, weights = load_backbone(cfg, *checkpoint)
            loaded = torch.stack([read_center(cfg, path, args.size) for path in paths])
            images = cli.normalize(loaded, cfg).to(args.device)
            erf = effective_receptive_field(backbone.to(args.device), images)
            fields.append(Field(Path(config).stem, kernel_sizes(backbone), weights, erf,
                                contribution_squares(erf)))  # fmt: skip
    return fields


@cli.report_errors(CheckpointError, OSError, RuntimeError, ValueError)
def main() -> None:
    parser = cli.make_parser('Effective receptive fields of backbones')
    parser.add_argument('--model', nargs='+', action='append', required=True,
                        metavar=('CONFIG', 'CHECKPOINT'), help='once for each model; '
                        'without a checkpoint from random weights')  # fmt: skip
    parser.add_argument('--kernel-sizes', nargs='+', type=int,
                        help='draw a single config with each, from random weights')  # fmt: skip
    parser.add_argument('--images', type=Path, required=True, help='folder of images')
    parser.add_argument('--num-images', type=int, default=50, help='at most')
    parser.add_argument('--size', type=cli.size, default='256x256', metavar='HEIGHTxWIDTH',
                        help='size of the images: multiples of twice the last stride')  # fmt: skip
    parser.add_argument('--device', type=device, default='cpu')
    parser.add_argument('--out', type=cli.png, required=True, help='file to write, .png')
    cli.add_cfg_options(parser)
    args = parser.parse_args()
    if any(len(model) > 2 for model in args.model):
        parser.error('--model takes a config and a checkpoint; repeat --model for the next one')
    if args.kernel_sizes and (len(args.model) > 1 or len(args.model[0]) > 1):
        parser.error('--kernel-sizes takes one --model, without a checkpoint')
    if args.num_images < 1:
        parser.error('--num-images must be 1 or more')
    fields = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(fields, args.out)
    print(f'{make_table(fields)}\nwritten to {args.out}')


if __name__ == '__main__':
    sys.exit(main())
