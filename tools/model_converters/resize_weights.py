"""Change the attention kernels of a checkpoint to another size, or its image channels.

    python tools/model_converters/resize_weights.py SRC DST.pth --kernel-size 53 [--nearest]
    python tools/model_converters/resize_weights.py SRC DST.pth --in-channels 4

SRC is a checkpoint in any published layout, of a backbone or a whole model; DST
gets a hash in its name and loads with the new kernel_size and in_channels in the config.

With other kernels the network stays the same function: without --nearest, a size for
which that is impossible is refused. Several sizes are one per stage. Of weights for 3
channels, those for 1 are the sum; for others they are repeated in turn and rescaled.
"""

import sys

from lska_mm.cli import converter_parser, report_errors
from lska_mm.weights.channels import resize_channels
from lska_mm.weights.convert import convert
from lska_mm.weights.names import CheckpointError
from lska_mm.weights.resize import resize_kernels, summarize_errors


@report_errors(CheckpointError, OSError, ValueError)
def main() -> None:
    parser = converter_parser('Change the size of attention kernels, or the image channels')
    parser.add_argument('--kernel-size', type=int, nargs='+', help='new size, or one per stage')
    parser.add_argument(
        '--nearest', action='store_true', help='fit what cannot stay the same function'
    )
    parser.add_argument('--in-channels', type=int, help='new number of channels of an image')
    args = parser.parse_args()
    if args.kernel_size is None and args.in_channels is None:
        parser.error('give --kernel-size, --in-channels, or both')

    def resize(state_dict: dict) -> tuple[dict, list[str], str]:
        details, summary = [], []
        if args.in_channels is not None:
            state_dict = resize_channels(state_dict, args.in_channels)
            summary.append(f'images of {args.in_channels} channels')
        if args.kernel_size is not None:
            sizes = args.kernel_size if len(args.kernel_size) > 1 else args.kernel_size[0]
            state_dict, errors = resize_kernels(state_dict, sizes, args.nearest)
            details += [
                f'{gate}: relative error {error.max():.3g} at most, {error.mean():.3g} on average'
                for gate, error in errors.items()
            ]
            summary.append(summarize_errors(errors))
        return state_dict, details, ', '.join(summary)

    convert(args, resize)


if __name__ == '__main__':
    sys.exit(main())
