"""Convert tensor names from any published layout to ours.

These layouts load without an option:

1. the ImageNet files of arXiv:2309.01439: ``block1.0.attn...``, ``head``; also with ``module.``;
2. the same authors' detection and segmentation copies: ``blocks1``, ``DW_conv_h``;
3. VAN in mmpretrain: ``DW_conv``, ``DW_D_conv`` (``attention='LKA'``);
4. classifiers, detectors and segmentors of this package: ``backbone.``.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; says what was found and expected."""


class RefusedError(Exception):
    """A file refers to something that is not allowed; names it."""


# A tensor of the backbone, at the top of a file or behind `backbone.`.
_BACKBONE_KEY = re.compile(r'(?:backbone\.)?((?:patch_embed|blocks?|norm)\d+\..+)')
_RENAMES = (
    (r'^blocks(\d)', r'block\1'),
    (r'^(patch_embed\d+)\.projection\.', r'\1.proj.'),
    (r'\.dwconv(\.dwconv)+(?=\.)', '.dwconv'),
    (r'\.DW_D_conv(_[hv])?(?=\.)', r'.conv_spatial\1'),
    (r'\.DW_conv_?([hv]?)(?=\.)', r'.conv0\1'),
)


def convert_key(key: str) -> str:
    """Convert the name of a tensor to the layout of this package's classifiers.

    Names that belong to neither a backbone nor a published linear head only lose
    ``module.``. Converting twice changes nothing more.
    """
    key = re.sub(r'^(module\.)+', '', key)
    match = _BACKBONE_KEY.fullmatch(key)
    if match:
        key = match[1]
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        return f'backbone.{key}'
    return re.sub(r'^head\.(weight|bias)$', r'head.fc.\1', key)


def convert_state_dict(state_dict: Mapping[str, Any], source: str = '') -> dict[str, Any]:
    """Rename every tensor with `convert_key`; drop and change none.

    Raises:
        CheckpointError: If two tensors would get the same name, or a name is not text;
            starts with ``source``, the file that they are from.
    """
    where = f'{source}: ' if source else ''
    names: dict[str, str] = {}  # new to old
    for key in state_dict:
        if not isinstance(key, str):
            raise CheckpointError(f'{where}The name of a tensor is {key!r:.100}, not text.')
        name = convert_key(key)
        if name in names:
            raise CheckpointError(
                f'{where}{names[name]} and {key} are both {name}; the file mixes two layouts.'
            )
        names[name] = key
    return {name: state_dict[key] for name, key in names.items()}


def get_state_dict(checkpoint: Any) -> Mapping[str, Tensor]:
    """Return the weights in a checkpoint: wrapped in ``state_dict``, or bare."""
    if not isinstance(checkpoint, Mapping):
        return {}
    state_dict = checkpoint.get('state_dict', checkpoint)
    return state_dict if isinstance(state_dict, Mapping) else {}


class _FileMetadata(OrderedDict):
    """The ``_metadata`` of a state dict; PyTorch and MMEngine pass each module its entry.

    It adds the file's name to every entry, and is saved as an ordinary dictionary.
    """

    file = ''

    def get(self, key, default=None):
        return {**super().get(key, {}), 'file': self.file}

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)


def from_file(state_dict: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return the same tensors, marked with the file that they are from.

    An `LSKAVAN` then refuses them if a part of it would stay random, unlike MMEngine.
    """
    result: Any = OrderedDict(state_dict)
    result._metadata = _FileMetadata(getattr(state_dict, '_metadata', {}))
    result._metadata.file = file
    return result
