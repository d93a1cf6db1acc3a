"""Make an LSKA-VAN of a VAN: its 2-D attention kernels as products of 1-D ones.

    python tools/model_converters/van2lska.py SRC DST.pth

SRC is a checkpoint of VAN (arXiv:2202.09741) by its authors, by mmpretrain, or
of LSKAVAN(attention='LKA'), a backbone or a whole model; DST gets a hash in its
name and loads with attention='LSKA' and the same kernel_size. Every kernel
becomes the nearest product of a column and a row: what that keeps of the
energy (sum of squares) is printed. The network is another function then, and a
start for training.
"""

import argparse
import statistics
import sys
from pathlib import Path

from lska_mm.checkpoint import CheckpointError, describe
from lska_mm.convert import in_words, read_checkpoint, split_meta, write_checkpoint
from lska_mm.kernels import separate_kernels
from lska_mm.launch import report_errors


@report_errors(CheckpointError, OSError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Make 2-D attention kernels 1-D')
    parser.add_argument('src', help='checkpoint of a VAN, in any published layout')
    parser.add_argument('dst', type=Path, help='file to write; a hash is added to its name')
    args = parser.parse_args()
    if args.dst.suffix != '.pth':
        parser.error(f'DST must end in .pth, got {args.dst}')
    content, state_dict = read_checkpoint(args.src)
    print(f'found {in_words(describe(state_dict) or {})}, {len(state_dict)} tensors')
    separated, shares = separate_kernels(state_dict)
    kept, dropped = split_meta(content)
    written, description = write_checkpoint(separated, args.dst, **kept)
    for name, share in shares.items():
        print(f'{name}: {share:.1%} of the energy kept')
    print(
        f'{in_words(description)}: {min(shares.values()):.1%} of the energy kept at least, '
        f'{statistics.mean(shares.values()):.1%} on average over {len(shares)} layers'
    )
    if dropped:
        print(f'left out, as it belongs to the old kernels: {", ".join(dropped)}')
    print(f'written to {written}')


if __name__ == '__main__':
    sys.exit(main())
