"""Read, check and write checkpoints, for the tools that convert them."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .loader import find_checkpoint, load_from_local
from .match import read_state, signature
from .names import get_state_dict

State = dict[str, Any]


def convert(source: str, target: Path, transform: Callable[[State, Mapping], State]) -> None:
    """Read a checkpoint, change its tensors, and write another; print what was done.

    ``transform`` takes tensors under this package's names, and ``meta``; it returns tensors.
    Of the rest of the file only ``meta`` is kept, without the config's text.
    The file ``target`` gets a hash in its name: NAME.pth becomes NAME-1a2b3c4d.pth.

    Raises:
        CheckpointError: If there is no LSKA-VAN in the file, or only a part of one.
        FileExistsError: If the output file is ``source``.
    """
    content = load_from_local(find_checkpoint(source), 'cpu')
    tensors = get_state_dict(content)
    state, _ = read_state(tensors, source)
    print(f'found {signature(state)}, {len(state)} tensors')
    wrapper = {} if content is tensors else content
    meta = wrapper.get('meta')
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    converted = transform(state, meta)
    left = sorted(str(key) for key in wrapper.keys() - {'state_dict', 'meta'})
    if meta.pop('cfg', None):
        left.append('meta.cfg')
    buffer = io.BytesIO()
    torch.save(dict(state_dict=converted, meta=meta), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    written = target.with_name(f'{target.stem}-{digest}.pth')
    if written.exists() and written.samefile(source):
        raise FileExistsError(f'{written} is the file to convert; choose another output file.')
    with written_beside(written) as part:
        part.write_bytes(buffer.getbuffer())
    print(f'result: {signature(converted)}')
    if left:
        print(f'not copied, as it belongs to the old weights: {", ".join(left)}')
    print(f'written to {written}')


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that replaces it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
