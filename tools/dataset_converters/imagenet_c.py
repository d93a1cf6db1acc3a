"""Corrupt the images in a folder of classes, as in ImageNet-C.

    python tools/dataset_converters/imagenet_c.py SRC --out OUT --size 224x224

reads SRC/class/image and writes OUT/corruption/severity/class/image for the 15
standard corruptions, the 4 extra ones and 5 severities (Hendrycks and Dietterich,
ICLR 2019, arXiv:1903.12261), with the package `imagecorruptions`. The result is
reproducible.
"""

import argparse
import sys
import zlib
from pathlib import Path

import mmcv
import numpy as np
from skimage.filters import gaussian
from skimage.util import random_noise

from lska_mm.cli import make_parser, read_image, report_errors, size

SEVERITIES = range(1, 6)
MIN_SIZE = 32  # of imagecorruptions


def load_imagecorruptions():
    """Import `imagecorruptions`, which was written for NumPy 1 and an older scikit-image."""
    if not hasattr(np, 'float_'):
        np.float_ = np.float64
    import imagecorruptions

    def blur(image, sigma, multichannel=False, **kwargs):
        return gaussian(image, sigma, channel_axis=-1 if multichannel else None, **kwargs)

    def noise(image, **kwargs):  # to use the seed of NumPy
        return random_noise(image, rng=np.random.randint(2**31), **kwargs)

    imagecorruptions.corruptions.gaussian = blur
    imagecorruptions.corruptions.sk.util.random_noise = noise
    return imagecorruptions


def find_images(source: Path, per_class: int | None) -> list[Path]:
    """Return the first images of each class.

    Raises:
        FileNotFoundError: If there are none; says what was expected.
    """
    images = []
    for folder in sorted(path for path in source.glob('*') if path.is_dir()):
        images += sorted(path for path in folder.iterdir() if path.is_file())[:per_class]
    if not images:
        raise FileNotFoundError(f'No image in {source}; expected files like {source}/CLASS/IMAGE.')
    return images


def read_square(path: Path, size: int) -> np.ndarray:
    """Resize the short side of an image to ``size``; return its center (size, size, 3), RGB.

    Raises:
        OSError: If it is not an image.
    """
    image = read_image(path)[..., ::-1]
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    image = mmcv.imresize(image, shape, interpolation='bicubic')
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def convert(args: argparse.Namespace) -> None:
    """Write the data set below ``args.out``."""
    package = load_imagecorruptions()
    known = package.get_corruption_names('all')
    unknown = sorted(set(args.corruptions or ()) - set(known))
    if unknown:
        raise ValueError(f'Unknown corruptions: {", ".join(unknown)}; known: {", ".join(known)}.')
    images = find_images(args.source, args.per_class)
    for corruption in args.corruptions or known:
        for path in images:
            image = read_square(path, args.size[0])
            for severity in SEVERITIES:
                np.random.seed(zlib.crc32(f'{corruption}{severity}{path.name}'.encode()))
                corrupted = package.corrupt(image, severity, corruption)
                target = args.out / corruption / str(severity) / path.parent.name / path.name
                mmcv.imwrite(corrupted[..., ::-1], str(target))
        print(f'{corruption}: {len(images)} images, 5 severities', flush=True)
    print(f'written to {args.out}')


@report_errors(OSError, ValueError)
def main() -> None:
    parser = make_parser('Corrupt images as ImageNet-C does')
    parser.add_argument('source', type=Path, help='folder of classes')
    parser.add_argument('--out', type=Path, required=True, help='output folder')
    parser.add_argument(
        '--size', type=size, default='224x224', metavar='HEIGHTxWIDTH',
        help='size of the images: a square, cut from the center',
    )  # fmt: skip
    parser.add_argument('--per-class', type=int, help='maximum number of images per class')
    parser.add_argument('--corruptions', nargs='+', help='corruptions to apply; all 19 by default')
    args = parser.parse_args()
    height, width = args.size
    if not MIN_SIZE <= height == width:
        parser.error(f'--size must be a square of {MIN_SIZE}x{MIN_SIZE} or more')
    convert(args)


if __name__ == '__main__':
    sys.exit(main())
