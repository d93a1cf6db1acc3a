"""Write scikit-learn's handwritten digits as an ImageNet-style folder.

    python tools/dataset_converters/digits.py [--out data/digits]

writes OUT/{train,val}/{0..9}/*.png, 8 x 8 pixels of 8 bit. Every fifth image
of a class is for validation. The digits are the test part of the "Optical
recognition of handwritten digits" set (Alpaydin and Kaynak, UCI, 1998), which
scikit-learn ships.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import mmcv
import numpy as np
from sklearn.datasets import load_digits

from lska_mm.launch import report_errors


def convert(out: Path) -> None:
    """Write the data set below ``out``."""
    digits = load_digits()
    seen: Counter[int] = Counter()
    written: Counter[str] = Counter()
    for image, label in zip(digits.images, digits.target):
        number = seen[label]
        seen[label] += 1
        split = 'val' if number % 5 == 4 else 'train'
        pixels = np.round(image * (255 / 16)).astype(np.uint8)  # 17 grey levels
        mmcv.imwrite(pixels, str(out / split / str(label) / f'{number:03d}.png'))
        written[split] += 1
    for split, count in written.items():
        print(f'{split}: {count} images of {len(seen)} classes')
    print(f'written to {out}')


@report_errors(OSError)
def main() -> None:
    parser = argparse.ArgumentParser(description="Convert scikit-learn's digits")
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='output folder')
    args = parser.parse_args()
    convert(args.out)


if __name__ == '__main__':
    sys.exit(main())
