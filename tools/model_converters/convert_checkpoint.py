"""Convert a checkpoint of any supported layout, also to other kernels or image channels.

    python tools/model_converters/convert_checkpoint.py SRC DST.pth
    python tools/model_converters/convert_checkpoint.py SRC DST.pth --kernel-size 53 [--nearest]
    python tools/model_converters/convert_checkpoint.py SRC DST.pth --in-channels 4
    python tools/model_converters/convert_checkpoint.py SRC DST.pth --separate

SRC is a checkpoint of a backbone or a whole model; DST gets a hash in its name, as in
OpenMMLab: DST-1a2b3c4d.pth. Everything else stays as it is, including norms of any kind.
Without options, the tensors are only renamed to those of this package's classifiers, and
SRC's optimizer and the like are left out; the configs also load SRC unconverted.

With other kernels the network computes the same function: without --nearest, a size for
which that is impossible is refused. Give several sizes for one per stage. Weights for 3
channels are summed for 1; for other numbers they are repeated in turn and rescaled.

--separate is for VAN (arXiv:2202.09741) by its authors, by mmpretrain, or
LSKAVAN(attention='LKA'): every 2-D kernel becomes the nearest product of a column and a
row, and the energy (sum of squares) kept is printed. DST loads with attention='LSKA'; it
is a different function, as a starting point for training.
"""

import statistics
import sys
from collections.abc import Mapping

from lska_mm.cli import converter_parser, report_errors
from lska_mm.weights.convert import State, convert
from lska_mm.weights.names import CheckpointError
from lska_mm.weights.resize import (
    resize_channels,
    resize_kernels,
    separate_kernels,
    summarize_errors,
)


@report_errors(CheckpointError, OSError, ValueError)
def main() -> None:
    parser = converter_parser('Convert a checkpoint, also to other kernels or image channels')
    parser.add_argument('--kernel-size', type=int, nargs='+', help='new size, or one per stage')
    parser.add_argument(
        '--nearest', action='store_true', help='fit kernels that cannot stay the same function'
    )
    parser.add_argument('--in-channels', type=int, help='new number of channels of an image')
    parser.add_argument('--separate', action='store_true',
                        help="make 2-D kernels 1-D, attention='LKA' to 'LSKA'")  # fmt: skip
    args = parser.parse_args()

    def transform(state: State, meta: Mapping) -> State:
        if args.separate:
            state, shares = separate_kernels(state)
            for name, share in shares.items():
                print(f'{name}: {share:.1%} of the energy kept')
            print(
                f'{min(shares.values()):.1%} of the energy kept at least, '
                f'{statistics.mean(shares.values()):.1%} on average over {len(shares)} layers'
            )
        if args.in_channels is not None:
            state = resize_channels(state, args.in_channels)
        if args.kernel_size is not None:
            sizes = args.kernel_size if len(args.kernel_size) > 1 else args.kernel_size[0]
            state, errors = resize_kernels(state, sizes, args.nearest)
            for gate, error in errors.items():
                print(
                    f'{gate}: relative error {error.max():.3g} at most, '
                    f'{error.mean():.3g} on average'
                )
            print(f'kernels resized, {summarize_errors(errors)}')
        return state

    convert(args.src, args.dst, transform)


if __name__ == '__main__':
    sys.exit(main())
