"""Make an LSKA-VAN of a VAN: its 2-D attention kernels as products of 1-D ones.

    python tools/model_converters/van2lska.py SRC DST.pth

SRC is a checkpoint of VAN (arXiv:2202.09741) by its authors, by mmpretrain, or
of LSKAVAN(attention='LKA'), a backbone or a whole model; DST gets a hash in its
name and loads with attention='LSKA' and the same kernel_size. Every kernel
becomes the nearest product of a column and a row: what that keeps of the
energy (sum of squares) is printed. The network is another function then, and a
start for training.
"""

import statistics
import sys

from lska_mm.cli import converter_parser, report_errors
from lska_mm.weights.convert import convert
from lska_mm.weights.names import CheckpointError
from lska_mm.weights.separate import separate_kernels


def separate(state_dict: dict) -> tuple[dict, list[str], str]:
    separated, shares = separate_kernels(state_dict)
    details = [f'{name}: {share:.1%} of the energy kept' for name, share in shares.items()]
    summary = (
        f'{min(shares.values()):.1%} of the energy kept at least, '
        f'{statistics.mean(shares.values()):.1%} on average over {len(shares)} layers'
    )
    return separated, details, summary


@report_errors(CheckpointError, OSError)
def main() -> None:
    convert(converter_parser('Make 2-D attention kernels 1-D').parse_args(), separate)


if __name__ == '__main__':
    sys.exit(main())
