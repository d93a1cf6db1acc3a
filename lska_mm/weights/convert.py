"""What the tools that rewrite checkpoints share: read, check, write."""

import hashlib
import io
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS

from .gate import read_state
from .loader import load_from_local
from .match import arch_name, describe
from .names import CheckpointError, get_state_dict


def convert(
    args: Namespace, transform: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str], str]]
) -> None:
    """Read ``args.src``, change its tensors, and write ``args.dst``; say what was done.

    Of what else the file holds, ``meta`` stays, without the text of the config.

    Args:
        args: What `lska_mm.cli.converter_parser` parsed.
        transform: From tensors to others, lines to print of its details, and a summary.

    Raises:
        CheckpointError: If there is no LSKA-VAN in the file, or not a whole one.
    """
    content, state_dict = read(args.src)
    print(f'found {_in_words(describe(state_dict) or {})}, {len(state_dict)} tensors')
    converted, details, summary = transform(state_dict)
    description = whole(converted)
    kept, dropped = {}, []
    if 'state_dict' in content:
        meta = content.get('meta')
        dropped = sorted(str(key) for key in content if key not in ('state_dict', 'meta'))
        if isinstance(meta, Mapping):
            kept = dict(meta={key: value for key, value in meta.items() if key != 'cfg'})
            dropped += ['meta.cfg'] if 'cfg' in meta else []
    written = save_with_hash(dict(state_dict=converted, **kept), args.dst, args.src)
    print('\n'.join([*details, f'{description}: {summary}']))
    if dropped:
        print(f'left out, as it belongs to the old weights: {", ".join(dropped)}')
    print(f'written to {written}')


def read(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all that a file holds, and its tensors under this package's names.

    Raises:
        CheckpointError: If there is no LSKA-VAN among them.
    """
    content = load_from_local(source, 'cpu')
    return content, read_state(get_state_dict(content), source)[0]


def whole(state_dict: Mapping[str, Any]) -> str:
    """Say in words which LSKA-VAN tensors are.

    Raises:
        CheckpointError: If they are not a whole one.
    """
    description = describe(state_dict) or {}
    deploy = 'backbone.block1.0.shortcut' in state_dict
    last = len(description['arch']['depths']) - 1
    try:
        backbone = MODELS.build(
            dict(type='LSKAVAN', **description, deploy=deploy, out_indices=(last,))
        )
    except ValueError as error:  # of kernels that no gate has
        raise CheckpointError(f'These are not the tensors of an LSKA-VAN: {error}') from None
    backbone.load_state_dict(state_dict)
    return _in_words(description)


def save_with_hash(content: Mapping[str, Any], target: Path, source: str) -> Path:
    """Write a checkpoint, NAME.pth as NAME-1a2b3c4d.pth; return the file written.

    Raises:
        FileExistsError: If that is the file ``source``.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    written = target.with_name(f'{target.stem}-{digest}.pth')
    if written.exists() and written.samefile(source):
        raise FileExistsError(f'{written} is the file to convert; name another one to write.')
    with written_beside(written) as part:
        part.write_bytes(buffer.getbuffer())
    return written


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a file to write, which takes the place of ``path`` at the end, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _in_words(description: Mapping[str, Any]) -> str:
    """What `describe` found, in a line."""
    name = arch_name(description['arch']) or description['arch']
    return (
        f'arch {name}, attention {description["attention"]}, '
        f'kernel size {description["kernel_size"]}'
    )
