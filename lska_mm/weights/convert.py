"""Read, check and write checkpoints, for the tools that convert them."""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from .loader import find_checkpoint, load_from_local
from .match import PUBLISHED, compare, first_stages, read_state, signature
from .names import CheckpointError, get_state_dict

State = dict[str, Any]


def convert(
    source: str, target: Path, transform: Callable[[State, Mapping], tuple[State, list[str]]]
) -> None:
    """Read a checkpoint, change its tensors, and write another; print what was done.

    ``transform`` takes tensors under this package's names, and ``meta``; it returns tensors
    and lines to print. Of the rest of the file only ``meta`` is kept, without the config's text.
    The file ``target`` gets a hash in its name: NAME.pth becomes NAME-1a2b3c4d.pth.

    Raises:
        CheckpointError: If there is no LSKA-VAN in the file, or only a part of one.
        FileExistsError: If the output file is ``source``.
    """
    content = load_from_local(find_checkpoint(source), 'cpu')
    tensors = get_state_dict(content)
    state = read_whole(tensors, source)
    print(f'found {signature(state)}, {len(state)} tensors')
    others = {} if content is tensors else {k: v for k, v in content.items() if v is not tensors}
    meta = others.pop('meta', None)
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    converted, lines = transform(state, meta)
    cfg = [f'meta.{key}' for key in ('cfg',) if meta.pop(key, None)]
    buffer = io.BytesIO()
    torch.save(dict(state_dict=converted, **(dict(meta=meta) if meta else {})), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    written = target.with_name(f'{target.stem}-{digest}.pth')
    if written.exists() and written.samefile(source):
        raise FileExistsError(f'{written} is the file to convert; choose another output file.')
    with written_beside(written) as part:
        part.write_bytes(buffer.getbuffer())
    print('\n'.join([*lines, f'now {signature(converted)}']))
    if others or cfg:
        left = ', '.join([*sorted(map(str, others)), *cfg])
        print(f'left out, as it belongs to the old weights: {left}')
    print(f'written to {written}')


def read_whole(state_dict: Mapping[str, Any], source: str) -> State:
    """Return tensors under this package's names, if they are a complete LSKA-VAN.

    Its norms may be of any kind, with the same tensors in all blocks and stages. There may
    be tensors of a subclass's own modules.

    Raises:
        CheckpointError: If there is no LSKA-VAN among them, or only a part of one; if shapes
            do not fit each other; if a tensor has NaN or infinity.
    """
    state, description = read_state(state_dict, source)
    van = first_stages(state, len(state))
    found = {key: value for key, value in van.items() if PUBLISHED.fullmatch(key)}
    try:
        with torch.device('meta'):
            backbone = MODELS.build(dict(type='LSKAVAN', **description, out_indices=[-1]))
    except ValueError as error:  # kernel sizes that no gate has
        raise CheckpointError(f'{source} holds no LSKA-VAN: {error}') from None
    norms = {name: norm.weight for name, norm in backbone.named_modules()
             if isinstance(norm, (nn.BatchNorm2d, nn.LayerNorm))}  # fmt: skip
    expected = {key: value for key, value in backbone.state_dict().items()
                if key.rpartition('.')[0] not in norms}  # fmt: skip
    kinds = defaultdict(set)  # the tensors that norms have in the file
    for key in found:
        kinds[re.sub(r'\d', '', key.rpartition('.')[0])].add(key.rpartition('.')[2])
    for norm, like in norms.items():
        for name in sorted(kinds[re.sub(r'\d', '', norm)]):
            value = found.get(f'{norm}.{name}')
            expected[f'{norm}.{name}'] = value if getattr(value, 'ndim', 1) != 1 else like
    problem = compare(found, expected)
    if problem:
        raise CheckpointError(f'{source} holds no complete {signature(state)}: {problem}.')
    return state


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
