"""Draw the effective receptive fields of backbones, and measure them.

    python tools/visualization/erf.py --model CONFIG CHECKPOINT --model CONFIG CHECKPOINT
        --images DIR --out erf.png
    python tools/visualization/erf.py --model CONFIG --kernel-sizes 7 23 53
        --images DIR --out erf.png

The field is what the pixels of an image contribute to the centre of the last
map: the gradient of its positive values, summed over channels, with respect to
the image; negative gradients count as zero, the image's channels are summed, and
images are averaged. This is the protocol of RepLKNet (arXiv:2203.06717). Without
it, that is with all values instead of the positive ones, a LayerNorm at the end
would leave nothing: its channels sum to a constant.

Any config with a backbone that returns maps will do, of any toolbox. Without a
checkpoint the weights are random, and the picture says so. A panel a model, all
on one scale: the contribution relative to the largest one, logarithmic. The
squares are the smallest around the centre that hold 20, 50 and 99 % of it; their
sides, and their shares of the image's area, are printed as a Markdown table.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from lska_mm.cli import (
    add_cfg_options,
    load_backbone,
    make_parser,
    markdown,
    normalize,
    png,
    read_config,
    read_image,
    report_errors,
)
from lska_mm.weights.names import CheckpointError

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

SHARES = (0.2, 0.5, 0.99)
COLOURS = ('#ffffff', '#00e5ff', '#7cff4f')  # of the squares
FLOOR = 1e-4  # of the largest contribution; less is drawn alike
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


# --- What is measured ----------------------------------------------------------


def effective_receptive_field(backbone: nn.Module, images: Sequence[Tensor] | Tensor) -> Tensor:
    """What each pixel contributes to the centre of the backbone's last map.

    Args:
        backbone: Returns a map (B, C', H', W') or several, the last one last;
            in evaluation mode.
        images: Images (C, H, W) of one size, as the backbone wants them.

    Returns:
        Contributions (H, W), none negative, averaged over the images.

    Raises:
        ValueError: If what the backbone returns is no map, or the centre of the map
            does not lie over the centre of the image.
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
                    f'The {type(backbone).__name__} returns {tuple(last.shape)}, which is no map '
                    '(B, C, H, W).'
                )
            _check_centre(image.shape[2:], last.shape[2:])
            centre = last[0, :, last.shape[2] // 2, last.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(centre, image)
        total += gradient[0].relu().sum(0).cpu().double()
    return total / len(images)


def _check_centre(image: torch.Size, last: torch.Size) -> None:
    """Whether point (H' // 2, W' // 2) of the map is over pixel (H // 2, W // 2)."""
    for size, cells in zip(image, last):
        stride = _stride(size, cells)
        if cells // 2 * stride != size // 2:
            raise ValueError(
                f'The last map of {size} pixels has {cells} points, and the middle one is over '
                f'pixel {cells // 2 * stride}, not {size // 2}. Take a multiple of {2 * stride} '
                'pixels.'
            )


def _stride(size: int, cells: int) -> int:
    """Of a map with so many points: a power of two where one fits, as of nearly all backbones."""
    power = 2 ** round(math.log2(size / cells))
    exact, rest = divmod(size, cells)
    return exact if rest == 0 and -(-size // power) != cells else power


class Square(NamedTuple):
    """A square around the centre: its side in pixels, and its share of the image's area."""

    side: int
    area: float


def contribution_squares(erf: Tensor, shares: Sequence[float] = SHARES) -> list[Square]:
    """The smallest centred squares that hold ``shares`` of the contributions (H, W).

    Their sides are odd, around pixel (H // 2, W // 2), unless the image ends before.

    Raises:
        ValueError: If they sum to nothing, or to no number.
    """
    height, width = erf.shape
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    held = torch.bincount(distance.flatten(), weights=erf.double().flatten()).cumsum(0)
    if not held[-1] > 0:
        raise ValueError(
            f'What the pixels contribute to the centre of the last map sums to {held[-1]:.0f}: '
            'there are no shares of that.'
        )
    # Less a rounding error, so that a share of 1 is found where it is reached.
    wanted = torch.as_tensor(shares, dtype=torch.float64) * held[-1] * (1 - 1e-9)
    squares = []
    for radius in torch.searchsorted(held, wanted).tolist():
        sides = [min(2 * radius + 1, n) for n in (height, width)]
        squares.append(Square(max(sides), sides[0] * sides[1] / (height * width)))
    return squares


# --- Images ------------------------------------------


def find_images(folder: Path, number: int) -> list[Path]:
    """At most so many images below a folder, spread evenly over their sorted names.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'No folder {folder}; --images is a folder of images.')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f'No image ({" ".join(SUFFIXES)}) in {folder}.')
    steps = np.linspace(0, len(paths) - 1, min(number, len(paths)))
    return [paths[i] for i in steps.round().astype(int)]


def read_square(path: Path, side: int) -> np.ndarray:
    """The central square of an image, resized: (3, side, side) in BGR.

    Raises:
        OSError: If it is not an image.
    """
    image = read_image(path)
    height, width = image.shape[:2]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    square = image[top : top + length, left : left + length]
    return mmcv.imresize(square, (side, side), interpolation='area').transpose(2, 0, 1)


# --- Table and picture ---------------------------------------------------------


class Field(NamedTuple):
    """A row of the table and a panel of the picture."""

    name: str
    kernel_size: Any
    weights: str
    erf: Tensor
    squares: list[Square]


def make_table(fields: list[Field]) -> str:
    """Markdown: a row a model; sides in pixels, shares of the image's area in brackets."""
    head = ['model', 'kernel size', 'weights', *(f'{share:.0%} in' for share in SHARES)]
    rows = [head]
    for field in fields:
        cells = [f'{side} ({area:.1%})' for side, area in field.squares]
        rows.append([field.name, str(field.kernel_size or ''), field.weights, *cells])
    return markdown(rows)


def plot(fields: list[Field], path: Path) -> None:
    """A panel a field, on a common scale, with the squares."""
    columns = min(len(fields), 4)
    rows = -(-len(fields) // columns)
    titles = [textwrap.wrap(field.name, 38) for field in fields]
    for title, field in zip(titles, fields):
        kernel = f'kernel {field.kernel_size}, ' if field.kernel_size else ''
        title.append(f'{kernel}{field.weights}')
    lines = max(map(len, titles))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.3 * columns + 1, (3.4 + 0.17 * lines) * rows + 0.6),  # inches
        layout='constrained',
        squeeze=False,
    )
    for axis in axes.flat[len(fields) :]:
        axis.axis('off')
    for axis, field, title in zip(axes.flat, fields, titles):
        height, width = field.erf.shape
        top, left = -(height // 2) - 0.5, -(width // 2) - 0.5  # the centre is (0, 0)
        image = axis.imshow(
            (field.erf / field.erf.max()).clamp(min=FLOOR).numpy(),
            extent=(left, left + width, top + height, top),
            norm=LogNorm(FLOOR, 1),
            cmap='inferno',
        )
        for (side, _), colour, share in zip(field.squares, COLOURS, SHARES):
            radius = side / 2
            label = f'holds {share:.0%}' if field is fields[0] else None
            axis.add_patch(
                Rectangle((-radius, -radius), side, side, fill=False, color=colour, label=label)
            )
        axis.set(xlim=(left, left + width), ylim=(top + height, top))
        axis.set_title('\n'.join(title), fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel('pixels from the centre', fontsize=9)
    figure.colorbar(
        image, ax=axes, label='contribution / largest', extend='min', shrink=0.8, pad=0.01
    )
    figure.legend(
        loc='outside upper center', ncols=len(SHARES), fontsize=9, facecolor='#303030',
        labelcolor='white',
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(args: argparse.Namespace) -> list[Field]:
    """A field a model, or a kernel size of the one model.

    Raises:
        CheckpointError, OSError, ValueError: Say what is wrong.
    """
    paths = find_images(args.images, args.num_images)
    squares = np.stack([read_square(path, args.size) for path in paths])
    print(f'{len(paths)} images of {args.images}, {args.size} x {args.size} pixels')
    fields = []
    for config, *checkpoint in args.model:
        for size in args.kernel_sizes or [None]:
            cfg = read_config(config)
            cfg.merge_from_dict(args.cfg_options)
            if size is not None:
                name = cfg.get('model', {}).get('backbone', {}).get('type')
                if name != 'LSKAVAN':
                    raise ValueError(
                        f'--kernel-sizes is for the backbone LSKAVAN, {config} has {name}.'
                    )
                cfg.merge_from_dict({'model.backbone.kernel_size': size})
            torch.manual_seed(0)
            backbone = load_backbone(cfg, checkpoint[0] if checkpoint else None).to(args.device)
            erf = effective_receptive_field(backbone, normalize(squares, cfg).to(args.device))
            weights = Path(checkpoint[0]).name if checkpoint else 'random weights'
            kernel_size = getattr(backbone, 'kernel_size', None)
            fields.append(
                Field(Path(config).stem, kernel_size, weights, erf, contribution_squares(erf))
            )
    return fields


@report_errors(CheckpointError, OSError, RuntimeError, ValueError)
def main() -> None:
    parser = make_parser('Effective receptive fields of backbones')
    parser.add_argument('--model', nargs='+', action='append', required=True,
                        metavar=('CONFIG', 'CHECKPOINT'), help='once a model; '
                        'without a checkpoint from random weights')  # fmt: skip
    parser.add_argument('--kernel-sizes', nargs='+', type=int,
                        help='draw the one config with each, from random weights')  # fmt: skip
    parser.add_argument('--images', type=Path, required=True, help='folder, with its subfolders')
    parser.add_argument('--num-images', type=int, default=50, help='at most')
    parser.add_argument('--size', type=int, default=256, help='side of the images, in pixels; '
                        'a multiple of twice the stride of the last map')  # fmt: skip
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', type=png, required=True, help='file to write, .png')
    add_cfg_options(parser)
    args = parser.parse_args()
    if any(len(model) > 2 for model in args.model):
        parser.error('--model takes a config and a checkpoint; repeat --model for the next one')
    if args.kernel_sizes and (len(args.model) > 1 or len(args.model[0]) > 1):
        parser.error('--kernel-sizes takes one --model, without a checkpoint')
    if min(args.num_images, args.size) < 1:
        parser.error('--num-images and --size must be 1 or more')
    fields = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(fields, args.out)
    print(f'{make_table(fields)}\nwritten to {args.out}')


if __name__ == '__main__':
    sys.exit(main())
