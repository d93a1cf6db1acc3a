"""Rewrite a checkpoint of any published layout as a tensors-only file.

    python tools/convert_checkpoint.py SRC DST.pth

DST gets a hash in its name, as OpenMMLab's files have: DST-1a2b3c4d.pth. The
configs load SRC as it is; converting gives a file that opens with
`torch.load(weights_only=True)`, under the names of this package's classifiers.
"""

import sys

from lska_mm.cli import converter_parser, report_errors
from lska_mm.weights.convert import read, save_with_hash, whole
from lska_mm.weights.names import CheckpointError


@report_errors(CheckpointError, OSError)
def main() -> None:
    args = converter_parser('Convert a checkpoint to tensors only').parse_args()
    _, state_dict = read(args.src)
    print(f'{whole(state_dict)}, {len(state_dict)} tensors')
    print(f'written to {save_with_hash(dict(state_dict=state_dict), args.dst, args.src)}')


if __name__ == '__main__':
    sys.exit(main())
