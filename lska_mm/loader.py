"""Reading checkpoint files without running code that they may carry."""

import os
import pickle
import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor

from .checkpoint import CheckpointError, convert_state_dict, summarize

# torch's own names
FORCE_VARIABLE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
TRUST_VARIABLE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'

# The first convolution of a separable gate: no other network has one.
_SEPARABLE = re.compile(
    r'(?:module\.)*blocks?1\.0\.attn\.spatial_gating_unit\.'
    r'(?:conv0h|DW_conv_h)\.weight'
)


class _Refused(pickle.UnpicklingError):
    """Names what a pickle must not bring along."""


def _history_method(owner: type, name: str) -> Any:
    """Stands in for `getattr`, which MMEngine's logs are pickled with."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise _Refused(f'getattr({owner}, {name!r})')
    return getattr(HistoryBuffer, name)


_DTYPES_AND_STORAGES = ' '.join(
    name
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) or name.endswith('Storage')
)
_ALLOWED = {
    'builtins': 'bytearray complex dict float frozenset int list set slice str tuple',
    'collections': 'Counter OrderedDict defaultdict deque',
    'argparse': 'Namespace',
    '_codecs': 'encode',
    'mmengine.logging.history_buffer': 'HistoryBuffer',
    'numpy': 'dtype ndarray',
    'numpy.core.multiarray': '_reconstruct scalar',
    'numpy._core.multiarray': '_reconstruct scalar',
    'torch': f'Size device {_DTYPES_AND_STORAGES}',
    'torch._utils': '_rebuild_parameter _rebuild_tensor _rebuild_tensor_v2',
    'torch.nn.parameter': 'Parameter',
    'torch.storage': 'TypedStorage UntypedStorage',
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors, numbers and containers, and nothing that could act.

    torch's own ``weights_only`` reader takes no allow-list on torch 2.1 and
    could be made to run code there (CVE-2025-32434); this one reads alike on
    every version.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)
        if (module, name) == ('builtins', 'getattr'):
            return _history_method
        if name not in _ALLOWED.get(module, '').split():
            raise _Refused(f'{module}.{name}')
        return super().find_class(module, name)


def _load(file, **kwargs):
    return _Unpickler(file, **kwargs).load()


# What `torch.load` asks of a pickle module.
_RESTRICTED_PICKLE = types.ModuleType('restricted_pickle')
vars(_RESTRICTED_PICKLE).update(Unpickler=_Unpickler, load=_load)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '0').lower() in ('1', 'y', 'yes', 'true')


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
            f'No checkpoint at {path}. Put the weights there, or change the key that names '
            'them: model.backbone.init_cfg.checkpoint (init_cfg=None starts from random '
            'weights) or load_from. The configs take their weights from the folder '
            'in the environment variable LSKA_PRETRAINED, "pretrained" if it is not set.'
        )
    # Forced, torch reads by its own list of the harmless and takes no other.
    forced, trusted = _is_set(FORCE_VARIABLE), _is_set(TRUST_VARIABLE)
    pickle_module = None if forced or trusted else _RESTRICTED_PICKLE
    refusal = pickle.UnpicklingError if forced else _Refused
    try:
        checkpoint = torch.load(path, map_location, pickle_module, weights_only=forced)
    except refusal as error:
        raise CheckpointError(
            f'{path} was refused: it holds {error}, where only tensors, numbers, containers '
            'and argparse.Namespace are expected. Loading it could run code. If you trust '
            f'whoever made it, set {TRUST_VARIABLE}=1 for this one command.'
        ) from None
    except Exception as error:  # of any kind: the bytes may be anything
        raise CheckpointError(
            f'{path} is damaged, or not a file that torch.save wrote '
            f'({type(error).__name__}: {error}).'
        ) from error

    state_dict = get_state_dict(checkpoint)
    if any(_SEPARABLE.fullmatch(key) for key in state_dict if isinstance(key, str)):
        converted = convert_state_dict(state_dict)
        checkpoint = (
            {**checkpoint, 'state_dict': converted} if 'state_dict' in checkpoint else converted
        )
    tensors = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state_dict.items())
    if state_dict and tensors:
        print_log(f'{path} holds {summarize(state_dict)}', logger='current')
    return checkpoint


def get_state_dict(checkpoint: Any) -> Mapping[str, Tensor]:
    """The weights in a checkpoint: wrapped in ``state_dict``, or bare."""
    if not isinstance(checkpoint, Mapping):
        return {}
    state_dict = checkpoint.get('state_dict', checkpoint)
    return state_dict if isinstance(state_dict, Mapping) else {}
