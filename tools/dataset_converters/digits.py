"""Write scikit-learn's handwritten digits as an ImageNet-style folder.

    python tools/dataset_converters/digits.py [--out data/digits]

writes OUT/{train,val}/{0..9}/*.png, 8 x 8 pixels of 8 bit. Every fifth image
of a class is for validation. The digits are the test part of the "Optical
recognition of handwritten digits" set (Alpaydin and Kaynak, UCI, 1998), which
scikit-learn ships.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np

from lska_mm.cli import make_parser, report_errors

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f'{Path(sys.argv[0]).name}: {error}: pip install scikit-learn')


class Digit(NamedTuple):
    """An image (8, 8) with gray levels 0 to 16; ``number`` counts the images of its label."""

    image: np.ndarray
    label: int
    number: int
    split: str


def read_digits() -> Iterator[Digit]:
    """Yield all digits, every fifth of a label for validation."""
    digits = load_digits()
    seen: Counter[int] = Counter()
    for image, label in zip(digits.images, digits.target):
        number = seen[label]
        seen[label] += 1
        yield Digit(image, label, number, 'val' if number % 5 == 4 else 'train')


def convert(out: Path) -> None:
    """Write the data set below ``out``."""
    written: dict[str, Counter[int]] = dict(train=Counter(), val=Counter())
    for image, label, number, split in read_digits():
        pixels = np.round(image * (255 / 16)).astype(np.uint8)
        mmcv.imwrite(pixels, str(out / split / str(label) / f'{number:03d}.png'))
        written[split][label] += 1
    for split, labels in written.items():
        print(f'{split}: {labels.total()} images of {len(labels)} classes')
    print(f'written to {out}')


@report_errors(OSError)
def main() -> None:
    parser = make_parser("Convert scikit-learn's digits")
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='output folder')
    args = parser.parse_args()
    convert(args.out)


if __name__ == '__main__':
    sys.exit(main())
