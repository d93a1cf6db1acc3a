"""Change the attention kernels of a checkpoint to another size.

    python tools/model_converters/resize_kernel.py SRC DST.pth --kernel-size 53 [--nearest]

SRC is a checkpoint in any published layout, of a backbone or a whole model; DST
gets a hash in its name and loads with the new kernel_size in the config. The
network stays the same function: without --nearest, a size for which that is
impossible is refused. Several sizes are one per stage.
"""

import sys

from lska_mm.cli import report_errors
from lska_mm.weights.convert import convert, converter_parser
from lska_mm.weights.names import CheckpointError
from lska_mm.weights.resize import resize_kernels, summarize_errors


@report_errors(CheckpointError, OSError, ValueError)
def main() -> None:
    parser = converter_parser('Change the size of attention kernels')
    parser.add_argument(
        '--kernel-size', type=int, nargs='+', required=True, help='new size, or one per stage'
    )
    parser.add_argument(
        '--nearest', action='store_true', help='fit what cannot stay the same function'
    )
    args = parser.parse_args()
    kernel_size = args.kernel_size if len(args.kernel_size) > 1 else args.kernel_size[0]

    def resize(state_dict: dict) -> tuple[dict, list[str], str]:
        resized, errors = resize_kernels(state_dict, kernel_size, args.nearest)
        details = [
            f'{gate}: relative error {error.max():.3g} at most, {error.mean():.3g} on average'
            for gate, error in errors.items()
        ]
        return resized, details, summarize_errors(errors)

    convert(args, resize)


if __name__ == '__main__':
    sys.exit(main())
