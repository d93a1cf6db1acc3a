"""What the tools that rewrite checkpoints share: read, check, write."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, arch_name, convert_state_dict, describe
from .files import whole_file
from .loader import get_state_dict, load_from_local
from .models import LSKAVAN


def read_checkpoint(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the file of an LSKA-VAN, or of a model that has one.

    Returns:
        All that the file holds, and the tensors of the model under the names of
        this package's classifiers.

    Raises:
        CheckpointError: If there is no LSKA-VAN in it.
    """
    content = load_from_local(source, 'cpu')
    state_dict = convert_state_dict(get_state_dict(content), source)
    strangers = [key for key, value in state_dict.items() if not torch.is_tensor(value)]
    if strangers:
        raise CheckpointError(f'{source}: {strangers[0]} is no tensor.')
    if describe(state_dict) is None:
        raise CheckpointError(
            f'{source} holds no LSKA-VAN ({len(state_dict)} tensors, first: '
            f'{", ".join(list(state_dict)[:3]) or "none"}).'
        )
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
        backbone = LSKAVAN(**description, deploy=deploy, out_indices=(stages - 1,))
    except ValueError as error:  # of kernels that no gate has
        raise CheckpointError(f'These are not the tensors of an LSKA-VAN: {error}') from None
    backbone.load_state_dict(state_dict)

    buffer = io.BytesIO()
    torch.save(dict(state_dict=state_dict, **more), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    written = target.with_name(f'{target.stem}-{digest}.pth')
    with whole_file(written) as file:
        file.write(buffer.getbuffer())
    return written, description


def split_meta(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a checkpoint is still true when its kernels are others.

    Returns:
        ``meta`` without the text of the config, if there is one; and the names
        of all that is not kept beside the weights.
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
