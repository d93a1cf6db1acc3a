"""Checkpoint readers for MMEngine: of files, and of ``http://`` and ``https://`` URLs."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank

from .names import CheckpointError, RefusedError, convert_state_dict, from_file, get_state_dict
from .reader import read

# torch's own names
TRUST, DISTRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
# The first convolution of a separable gate: no other network has one.
_SEPARABLE = re.compile(
    r'(module\.)*blocks?1\.0\.attn\.spatial_gating_unit\.(conv0h|DW_conv_h)\.weight'
)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read what `torch.save` wrote, without running code that the file may contain.

    Used by ``Pretrained``, ``load_from``, ``--resume`` and `init_detector`. An
    LSKA-VAN in the published layout comes back under this package's names, so
    that detectors and segmentors can start from its path. An `LSKAVAN` refuses
    tensors that would leave a part of it random, see `from_file`.

    Raises:
        OSError: If there is no such file.
        CheckpointError: If the file is damaged, or refers to functions that could
            run code; setting ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` trusts it.
    """
    try:
        path = find_checkpoint(filename)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} Put the weights there, or set another path in the config: '
            'model.backbone.init_cfg.checkpoint (init_cfg=None: random weights) or load_from. '
            'Our configs look in the folder that LSKA_PRETRAINED names, or in "pretrained".'
        ) from None
    if os.path.isdir(path):
        raise IsADirectoryError(f'{path} is a folder; name a checkpoint file in it.')
    trusted, distrusted = (
        os.environ.get(name, '').lower() in ('1', 'y', 'yes', 'true') for name in (TRUST, DISTRUST)
    )
    try:
        if trusted or distrusted:
            checkpoint = torch.load(path, map_location, weights_only=distrusted)
        else:
            checkpoint = read(path, map_location)
    except Exception as error:  # of any kind: the bytes may be anything
        reason = str(error)[:300].encode('unicode_escape').decode()
        if isinstance(error, pickle.UnpicklingError if distrusted else RefusedError):
            raise CheckpointError(
                f'{path} was refused: it holds {reason}, and loading that could run code. If you '
                f'trust its author, set {TRUST}=1 for this one command.'
            ) from None
        raise CheckpointError(
            f'{path} is damaged, or not a checkpoint of torch.save '
            f'({type(error).__name__}: {reason}).'
        ) from error
    if not isinstance(checkpoint, Mapping):
        return checkpoint
    state_dict = get_state_dict(checkpoint)
    wrapped = state_dict is not checkpoint
    if any(_SEPARABLE.fullmatch(str(key)) for key in state_dict):
        # `Pretrained(prefix='module.')` expects it; others remove it
        prefix = 'module.' if all(str(key).startswith('module.') for key in state_dict) else ''
        converted = convert_state_dict(state_dict, path)
        state_dict = {f'{prefix}{key}': value for key, value in converted.items()}
        checkpoint = {'meta': {}, **checkpoint}  # which mmseg's `init_model` asks for
    state_dict = from_file(state_dict, path)
    return {**checkpoint, 'state_dict': state_dict} if wrapped else state_dict


def find_checkpoint(filename: str) -> str:
    """Return the path of a checkpoint, ``~`` expanded, or its URL.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = os.path.expanduser(filename)
    if '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(f'No checkpoint at {path}.')
    return path


def load_from_http(
    filename: str,
    map_location: Any = None,
    model_dir: str | None = None,
    progress: bool = os.isatty(0),
) -> Any:
    """Download like MMEngine's function of this name, but read like `load_from_local`.

    Raises:
        OSError: If it cannot be downloaded.
        CheckpointError: As `load_from_local`; names the URL and the file.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / Path(urlparse(filename).path).name
    for turn in (get_rank() == 0, True):  # the others use the first one's download
        if turn and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(filename, str(path), progress=progress)
        barrier()
    try:
        return load_from_local(str(path), map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} It was downloaded from {filename}; delete it to try again.'
        ) from None
