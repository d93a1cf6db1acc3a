"""Rewrite a checkpoint of any published layout as a tensors-only file.

    python tools/convert_checkpoint.py SRC DST.pth

DST gets a hash in its name, as OpenMMLab's files have: DST-1a2b3c4d.pth. The
configs load SRC as it is; converting gives a file that opens with
`torch.load(weights_only=True)`, under the names of this package's classifiers.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from lska_mm import LSKAVAN
from lska_mm.checkpoint import (
    CheckpointError,
    arch_name,
    convert_state_dict,
    describe,
)
from lska_mm.loader import get_state_dict, load_from_local


def convert(source: str, target: Path) -> tuple[Path, dict, int]:
    """Convert ``source``; returns the file written, what it is, and its tensors.

    Raises:
        CheckpointError: If ``source`` is not a whole LSKA-VAN.
    """
    state_dict = convert_state_dict(get_state_dict(load_from_local(source, 'cpu')))
    strangers = [key for key, value in state_dict.items() if not torch.is_tensor(value)]
    if strangers:
        raise CheckpointError(f'{source}: {strangers[0]} is no tensor.')
    description = describe(state_dict)
    if description is None:
        raise CheckpointError(
            f'{source} holds no LSKA-VAN ({len(state_dict)} tensors, first: '
            f'{", ".join(list(state_dict)[:3]) or "none"}).'
        )
    stages = len(description['arch']['depths'])
    LSKAVAN(**description, out_indices=(stages - 1,)).load_state_dict(state_dict)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        try:
            torch.save(dict(state_dict=state_dict), file)
            file.flush()
            digest = hashlib.sha256(Path(file.name).read_bytes()).hexdigest()[:8]
            written = target.with_name(f'{target.stem}-{digest}.pth')
            os.replace(file.name, written)
        except BaseException:
            os.unlink(file.name)
            raise
    written.chmod(0o644)
    return written, description, len(state_dict)


def main() -> int:
    parser = argparse.ArgumentParser(description='Convert a checkpoint to tensors only')
    parser.add_argument('src', help='checkpoint in any published layout')
    parser.add_argument('dst', type=Path, help='file to write; a hash is added to its name')
    args = parser.parse_args()
    if args.dst.suffix != '.pth':
        parser.error(f'DST must end in .pth, got {args.dst}')
    try:
        written, description, tensors = convert(args.src, args.dst)
    except (CheckpointError, OSError) as error:
        print(f'convert_checkpoint.py: {error}', file=sys.stderr)
        return 1
    name = arch_name(description['arch']) or description['arch']
    print(
        f'arch {name}, attention {description["attention"]}, '
        f'kernel size {description["kernel_size"]}, {tensors} tensors'
    )
    print(f'written to {written}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
