"""How MMEngine reads checkpoints: without running code that they may carry."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from torch import Tensor

from .checkpoint import CheckpointError, convert_state_dict, summarize
from .reader import RefusedError, read

# torch's own names
FORCE_VARIABLE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
TRUST_VARIABLE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'

# The first convolution of a separable gate: no other network has one.
_SEPARABLE = re.compile(
    r'(?:module\.)*blocks?1\.0\.attn\.spatial_gating_unit\.'
    r'(?:conv0h|DW_conv_h)\.weight'
)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '0').lower() in ('1', 'y', 'yes', 'true')


def _line(error: Exception) -> str:
    """An error in a line: names in it come from the file, and may be anything."""
    return str(error)[:300].encode('unicode_escape').decode()


def load_from_local(path: str, map_location: Any = None) -> Any:
    """Read a checkpoint file without running code that it may carry.

    Registered with MMEngine as its reader of local files, so that it also
    serves ``Pretrained``, ``load_from``, ``--resume`` and `init_detector`. A
    file in the published layout comes back under this package's names, so
    that detectors and segmentors can start from it by its path alone.

    Args:
        path: A file that `torch.save` wrote.
        map_location: As for `torch.load`.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or holds objects other than
            tensors, numbers and containers. Setting the environment variable
            ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` trusts it all the same.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'No checkpoint at {path}. Put the weights there, or name others. In a config '
            'model.backbone.init_cfg.checkpoint names them (init_cfg=None starts from random '
            'weights), or load_from; ours look in the folder of the environment variable '
            'LSKA_PRETRAINED, "pretrained" if it is not set.'
        )
    # Forced, torch reads by its own list of the harmless and takes no other.
    forced, trusted = _is_set(FORCE_VARIABLE), _is_set(TRUST_VARIABLE)
    refusal = pickle.UnpicklingError if forced else RefusedError
    try:
        if forced or trusted:
            checkpoint = torch.load(path, map_location, weights_only=forced)
        else:
            checkpoint = read(path, map_location)
    except refusal as error:
        raise CheckpointError(
            f'{path} was refused: it holds {_line(error)}, where only tensors, numbers, '
            'containers and argparse.Namespace are expected. Loading it could run code. If you '
            f'trust whoever made it, set {TRUST_VARIABLE}=1 for this one command.'
        ) from None
    except Exception as error:  # of any kind: the bytes may be anything
        raise CheckpointError(
            f'{path} is damaged, or not a file that torch.save wrote '
            f'({type(error).__name__}: {_line(error)}).'
        ) from error

    state_dict = get_state_dict(checkpoint)
    if any(_SEPARABLE.fullmatch(key) for key in state_dict if isinstance(key, str)):
        converted = convert_state_dict(state_dict, path)
        checkpoint = (
            {**checkpoint, 'state_dict': converted} if 'state_dict' in checkpoint else converted
        )
    tensors = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state_dict.items())
    if state_dict and tensors:
        print_log(f'{path} holds {summarize(state_dict)}', logger='current')
    # The text of a config, which MMEngine would run on --resume to compare a setting.
    if (
        not trusted
        and isinstance(checkpoint, Mapping)
        and isinstance(checkpoint.get('meta'), dict)
    ):
        checkpoint['meta'].pop('config', None)
    return checkpoint


def load_from_url(
    url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True
) -> Any:
    """Download a checkpoint, unless it was before, and read it as `load_from_local` does.

    Stands in for what MMEngine downloads with, so that it serves ``http://`` and
    ``https://``, and the files behind ``torchvision://`` and ``open-mmlab://``.

    Args:
        url: Of a file that `torch.save` wrote.
        model_dir: The folder of downloads; by default torch's, ``hub/checkpoints``.
        map_location: As for `torch.load`.
        progress: Show how much of it has arrived.

    Raises:
        OSError: If it cannot be downloaded.
        CheckpointError: As `load_from_local`; names the URL and the file.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / Path(urlparse(url).path).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=progress)
    try:
        return load_from_local(str(path), map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} It is from {url}; delete it to download it anew.'
        ) from None


def get_state_dict(checkpoint: Any) -> Mapping[str, Tensor]:
    """The weights in a checkpoint: wrapped in ``state_dict``, or bare."""
    if not isinstance(checkpoint, Mapping):
        return {}
    state_dict = checkpoint.get('state_dict', checkpoint)
    return state_dict if isinstance(state_dict, Mapping) else {}
