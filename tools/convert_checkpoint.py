"""Rewrite a checkpoint of any published layout as a tensors-only file.

    python tools/convert_checkpoint.py SRC DST.pth

DST gets a hash in its name, as OpenMMLab's files have: DST-1a2b3c4d.pth. The
configs load SRC as it is; converting gives a file that opens with
`torch.load(weights_only=True)`, under the names of this package's classifiers.
"""

import argparse
import sys
from pathlib import Path

from lska_mm.checkpoint import CheckpointError
from lska_mm.convert import in_words, read_checkpoint, write_checkpoint
from lska_mm.launch import report_errors


@report_errors(CheckpointError, OSError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Convert a checkpoint to tensors only')
    parser.add_argument('src', help='checkpoint in any published layout')
    parser.add_argument('dst', type=Path, help='file to write; a hash is added to its name')
    args = parser.parse_args()
    if args.dst.suffix != '.pth':
        parser.error(f'DST must end in .pth, got {args.dst}')
    _, state_dict = read_checkpoint(args.src)
    written, description = write_checkpoint(state_dict, args.dst)
    print(f'{in_words(description)}, {len(state_dict)} tensors')
    print(f'written to {written}')


if __name__ == '__main__':
    sys.exit(main())
