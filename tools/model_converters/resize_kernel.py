"""Change the attention kernels of a checkpoint to another size.

    python tools/model_converters/resize_kernel.py SRC DST.pth --kernel-size 53 [--nearest]

SRC is a checkpoint in any published layout, of a backbone or a whole model; DST
gets a hash in its name and loads with the new kernel_size in the config. The
network stays the same function: without --nearest, a size for which that is
impossible is refused. Several sizes are one a stage.
"""

import argparse
import sys
from pathlib import Path

from lska_mm.checkpoint import CheckpointError, describe
from lska_mm.convert import in_words, read_checkpoint, split_meta, write_checkpoint
from lska_mm.kernels import resize_kernels, summarize_errors
from lska_mm.launch import report_errors


@report_errors(CheckpointError, OSError, ValueError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Change the size of attention kernels')
    parser.add_argument('src', help='checkpoint in any published layout')
    parser.add_argument('dst', type=Path, help='file to write; a hash is added to its name')
    parser.add_argument(
        '--kernel-size', type=int, nargs='+', required=True, help='new size, or one a stage'
    )
    parser.add_argument(
        '--nearest', action='store_true', help='fit what cannot stay the same function'
    )
    args = parser.parse_args()
    if args.dst.suffix != '.pth':
        parser.error(f'DST must end in .pth, got {args.dst}')
    kernel_size = args.kernel_size if len(args.kernel_size) > 1 else args.kernel_size[0]
    content, state_dict = read_checkpoint(args.src)
    print(f'found {in_words(describe(state_dict) or {})}, {len(state_dict)} tensors')
    resized, errors = resize_kernels(state_dict, kernel_size, args.nearest)
    kept, dropped = split_meta(content)
    written, description = write_checkpoint(resized, args.dst, **kept)
    for gate, error in errors.items():
        print(f'{gate}: relative error {error.max():.3g} at most, {error.mean():.3g} on average')
    print(f'{in_words(description)}: {summarize_errors(errors)}')
    if dropped:
        print(f'left out, as it belongs to the old kernels: {", ".join(dropped)}')
    print(f'written to {written}')


if __name__ == '__main__':
    sys.exit(main())
