"""What a checkpoint's pickle may call: for tensors, numbers, containers, logs and schedulers."""

import argparse
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from .names import RefusedError

_METHODS = ('min', 'max', 'mean', 'current', '_annealing_cos', '_annealing_linear')


def _tensor(storage, offset, size, stride, grad=False, hooks=None, metadata=None):
    """Rebuild a tensor; torch itself would enlarge the storage to any ``size``."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    bound = 0 not in size and storage.device.type != 'meta'
    if bound and not 0 <= offset <= last < storage._size():
        raise ValueError(f'a tensor of {size} on a storage of {storage._size()}')
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, grad, {}, metadata)


def _method(owner, name):
    if owner not in (HistoryBuffer, OneCycleParamScheduler) or name not in _METHODS:
        raise RefusedError(f'getattr({owner!r:.60}, {name!r:.60})')
    return getattr(owner, name)


def _dtype(code, *copy):
    if code[0] not in '?biufcSU':
        raise RefusedError(f'numpy.dtype({code!r:.60})')
    return np.dtype(code)


_CLASSES = (argparse.Namespace, HistoryBuffer, OneCycleParamScheduler, ConfigDict, Counter,
            OrderedDict, defaultdict, deque, complex, dict, float, frozenset, int, list, set,
            slice, torch.Size, torch.device)  # fmt: skip
ALLOWED: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind for kind in _CLASSES},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    'builtins.getattr': _method,
    'builtins.bytes': lambda: b'',
    '_codecs.encode': lambda text, _: text.encode('latin1'),  # how bytes are pickled
    'numpy.dtype': _dtype,
    'numpy.ndarray': None,  # an argument of the next
    'numpy.multiarray._reconstruct': lambda *_: np.empty(0),
    'numpy.multiarray.scalar': np.float64().__reduce__()[0],
    'torch.Tensor': None,  # an argument of the last
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._tensor._rebuild_from_type_v2': lambda function, kind, args, attributes: _tensor(*args),
}
