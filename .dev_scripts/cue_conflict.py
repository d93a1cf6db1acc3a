"""Write digits with a texture, and digits with the texture of another class.

    python .dev_scripts/cue_conflict.py [--out data/cue-conflict-digits]

writes, 96 x 96 pixels of 8 bit,

    OUT/{train,val}/CLASS/*.png               OUT/{train,val}.txt
    OUT/conflict/SHAPE/SHAPE1-TEXTURE2.png

a small stand-in for the images of Geirhos et al. (ICLR 2019, arXiv:1811.12231) to train
on as well as to test with. A class is a digit of scikit-learn's (see digits.py) filled with
stripes, of a direction for each class; in ``conflict`` a digit of ``val`` has the stripes of
another class. Classes have the names, and in the lists the labels, of ten of the classes of
ImageNet that ShapeBiasMetric knows: what it counts are decisions between their names.
"""

import sys
from pathlib import Path

import cv2
import mmcv
import numpy as np

from lska_mm.cli import make_parser, report_errors

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools/dataset_converters'))
from digits import read_digits

# By digit: a name that ShapeBiasMetric prints, and an ImageNet label that it counts as that.
# It divides by the number of such labels, which are at most four here: birds have 49.
CLASSES = dict(
    airplane=404, bear=294, bicycle=444, car=436, chair=423,
    clock=409, elephant=385, keyboard=508, knife=499, oven=766,
)  # fmt: skip
SIZE, DIGIT = 96, 64  # pixels
WAVELENGTH = 6  # pixels, of the stripes
JITTER = 9  # degrees, standard deviation of their direction; classes are 18 apart
GREY = 128


def draw(digit: np.ndarray, texture: int, rng: np.random.Generator) -> np.ndarray:
    """A digit (8, 8) of 17 grey levels at a random place, striped; (SIZE, SIZE)."""
    shape = cv2.resize(digit / 16, (DIGIT, DIGIT), interpolation=cv2.INTER_CUBIC) > 0.4
    y, x = np.mgrid[:SIZE, :SIZE]
    angle = np.pi * texture / len(CLASSES) + np.deg2rad(rng.normal(0, JITTER))
    wave = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / WAVELENGTH)
    stripes = 127.5 + 127.5 * np.sin(wave + rng.uniform(0, 2 * np.pi))
    image = np.full((SIZE, SIZE), GREY, np.uint8)
    top, left = rng.integers(0, SIZE - DIGIT + 1, 2)
    place = np.s_[top : top + DIGIT, left : left + DIGIT]
    image[place][shape] = stripes[place][shape]
    return image


def convert(out: Path) -> None:
    """Write the three parts below ``out``; the same at each call."""
    rng = np.random.default_rng(0)
    names = list(CLASSES)
    lists: dict[str, list[str]] = dict(train=[], val=[])
    for digit, label, number, split in read_digits():
        name = names[label]
        path = f'{split}/{name}/{number:03d}.png'
        mmcv.imwrite(draw(digit, label, rng), str(out / path))
        lists[split].append(f'{path} {CLASSES[name]}\n')
        if split == 'val':
            texture = (label + 1 + number // 5 % (len(names) - 1)) % len(names)
            path = f'conflict/{name}/{name}{number}-{names[texture]}{number}.png'
            mmcv.imwrite(draw(digit, texture, rng), str(out / path))
    for split, lines in lists.items():
        (out / f'{split}.txt').write_text(''.join(lines))
        print(f'{split}: {len(lines)} images of {len(names)} classes')
    print(f'conflict: {len(lists["val"])} images\nwritten to {out}')


@report_errors(OSError)
def main() -> None:
    parser = make_parser('Draw digits whose shape and texture differ')
    parser.add_argument(
        '--out', type=Path, default=Path('data/cue-conflict-digits'), help='output folder'
    )
    args = parser.parse_args()
    convert(args.out)


if __name__ == '__main__':
    sys.exit(main())
