"""Draw small images beside each other, enlarged.

    python .dev_scripts/panels.py image.png 'a digit' cam.png 'kernels of 7' --out FILE.png

Each path is followed by what stands above its panel.
"""

import matplotlib
import mmcv

from lska_mm.cli import make_parser, png, report_errors

matplotlib.use('Agg')
from matplotlib import pyplot as plt


@report_errors(OSError)
def main() -> None:
    parser = make_parser('Draw images beside each other')
    parser.add_argument('panels', nargs='+', metavar='IMAGE NAME', help='images, each with a name')
    parser.add_argument('--out', type=png, required=True, help='file to write, .png')
    args = parser.parse_args()
    paths, names = args.panels[::2], args.panels[1::2]
    if len(paths) != len(names):
        parser.error('give each image a name')
    figure, axes = plt.subplots(
        1, len(paths), figsize=(3.4 * len(paths), 3.7), layout='constrained', squeeze=False
    )
    for axis, path, name in zip(axes.flat, paths, names):
        axis.imshow(mmcv.imread(path, channel_order='rgb'), interpolation='nearest')
        axis.set_title(name)
        axis.axis('off')
    figure.savefig(args.out, dpi=110)
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
