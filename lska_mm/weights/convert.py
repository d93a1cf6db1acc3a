"""What the tools that rewrite checkpoints share: read, check, write."""

import hashlib
import io
from argparse import ArgumentParser, ArgumentTypeError, Namespace
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


def read_checkpoint(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the file of an LSKA-VAN, or of a model that has one.

    Returns all that the file holds, and the tensors under this package's names.

    Raises:
        CheckpointError: If there is no LSKA-VAN in it.
    """
    content = load_from_local(source, 'cpu')
    state_dict, _ = read_state(get_state_dict(content), source)
    others = [key for key, value in state_dict.items() if not torch.is_tensor(value)]
    if others:
        raise CheckpointError(f'{source}: {others[0]} is not a tensor.')
    return content, state_dict


def write_checkpoint(
    state_dict: Mapping[str, Any], target: Path, **more: Any
) -> tuple[Path, dict[str, Any]]:
    """Write tensors that are a whole LSKA-VAN, with a hash in the name of the file.

    Args:
        state_dict: Under the names of this package's classifiers.
        target: NAME.pth becomes NAME-1a2b3c4d.pth; its folder is made.
        more: What else to write beside ``state_dict``.

    Returns:
        The file written, and what `describe` says of it.

    Raises:
        CheckpointError: If the tensors are not a whole LSKA-VAN.
    """
    description = describe(state_dict) or {}
    stages = len(description['arch']['depths'])
    deploy = 'backbone.block1.0.shortcut' in state_dict
    try:
        backbone = MODELS.build(
            dict(type='LSKAVAN', **description, deploy=deploy, out_indices=(stages - 1,))
        )
    except ValueError as error:  # of kernels that no gate has
        raise CheckpointError(f'These are not the tensors of an LSKA-VAN: {error}') from None
    backbone.load_state_dict(state_dict)

    buffer = io.BytesIO()
    torch.save(dict(state_dict=state_dict, **more), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    written = target.with_name(f'{target.stem}-{digest}.pth')
    with written_beside(written) as part:
        part.write_bytes(buffer.getbuffer())
    return written, description


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


# --- A converter, from its arguments to its last line -----------------------------


def converter_parser(description: str) -> ArgumentParser:
    """Make a parser with the arguments that converters have in common."""
    parser = ArgumentParser(description=description)
    parser.add_argument('src', help='checkpoint in any published layout')
    parser.add_argument('dst', type=_pth, help='file to write, .pth; a hash is added to its name')
    return parser


def _pth(path: str) -> Path:
    if Path(path).suffix != '.pth':
        raise ArgumentTypeError(f'DST must end in .pth, got {path}')
    return Path(path)


def convert(
    args: Namespace,
    transform: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str], str]],
) -> None:
    """Read ``args.src``, change its tensors, and write ``args.dst``; say what was done.

    Args:
        args: What `converter_parser` parsed.
        transform: From tensors to others, lines to print of its details, and a summary.
    """
    content, state_dict = read_checkpoint(args.src)
    print(f'found {in_words(describe(state_dict) or {})}, {len(state_dict)} tensors')
    converted, details, summary = transform(state_dict)
    kept, dropped = split_meta(content)
    written, description = write_checkpoint(converted, args.dst, **kept)
    print('\n'.join([*details, f'{in_words(description)}: {summary}']))
    if dropped:
        print(f'left out, as it belongs to the old kernels: {", ".join(dropped)}')
    print(f'written to {written}')


def split_meta(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what of a checkpoint is still true of other kernels, and the names of the rest.

    That is ``meta`` without the text of the config, if there is one.
    """
    if 'state_dict' not in content:
        return {}, []
    meta = content.get('meta')
    kept = {}
    dropped = sorted(str(key) for key in content if key not in ('state_dict', 'meta'))
    if isinstance(meta, Mapping):
        kept = dict(meta={key: value for key, value in meta.items() if key != 'cfg'})
        dropped += ['meta.cfg'] if 'cfg' in meta else []
    return kept, dropped


def in_words(description: Mapping[str, Any]) -> str:
    """What `describe` found, in a line."""
    name = arch_name(description['arch']) or description['arch']
    return (
        f'arch {name}, attention {description["attention"]}, '
        f'kernel size {description["kernel_size"]}'
    )
