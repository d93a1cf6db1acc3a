"""Read what `torch.save` wrote, by `torch.load`, without running code that it may carry.

A pickle names what it calls, and finds what is in `_ALLOWED`; anything else is refused.
"""

import argparse
import os
import pickle
import re
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from .names import RefusedError

_LEGACY = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # near the start of files before torch 1.6
_METHODS = ('min', 'max', 'mean', 'current', '_annealing_cos', '_annealing_linear')


def _tensor(storage, offset, size, stride, grad=False, hooks=None, metadata=None):
    """Rebuild a tensor; torch itself would enlarge the storage to any ``size``."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    bound = 0 not in size and storage._untyped_storage.device.type != 'meta'
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
_ALLOWED: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind for kind in _CLASSES},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    'builtins.getattr': _method,
    'builtins.bytes': lambda: b'',
    '_codecs.encode': lambda text, _: text.encode('latin1'),  # how bytes are pickled
    'numpy.dtype': _dtype,
    'numpy.multiarray._reconstruct': lambda *_: np.empty(0),
    'numpy.multiarray.scalar': np.float64().__reduce__()[0],
    **dict.fromkeys(('numpy.ndarray', 'torch.Tensor')),  # arguments of others
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._tensor._rebuild_from_type_v2': lambda function, kind, args, attributes: _tensor(*args),
}
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # in Python: its steps can be checked


class _Unpickler(_Base):
    dispatch = dict(_Base.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # of any size
    sizes, room = dict[str, int](), 0  # bytes of each storage, and of the file for others

    def find_class(self, module, name):
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        path = re.sub(r'^numpy\._?core\.', 'numpy.', path)
        if path not in _ALLOWED:
            raise RefusedError(path)
        return _ALLOWED[path]

    def load_global(self):
        module, name = self.readline(), self.readline()
        if not name.endswith(b'\n'):
            raise EOFError('cut off in a name')
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_build(self):
        *_, target, state = self.stack
        if isinstance(target, HistoryBuffer):  # its class has the methods that the state names
            state.pop('statistics_methods', None)
        if isinstance(target, np.dtype) and state[1] in ('|', '<'):
            self.stack.pop()  # it has no more to say
        elif isinstance(target, (argparse.Namespace, HistoryBuffer, OrderedDict, np.ndarray)):
            _Base.load_build(self)
        else:
            raise RefusedError(f'attributes of {target!r:.60}')

    def load_binpersid(self):
        _, kind, key, _, count, *_ = self.stack[-1]
        size = count * kind.dtype.itemsize
        if key not in self.sizes:
            self.sizes[key], self.room = size, self.room - size
        if self.sizes[key] != size or self.room < 0:
            raise ValueError(f'a storage of {size} bytes')
        _Base.load_binpersid(self)

    dispatch.update(zip(b'cbQ', (load_global, load_build, load_binpersid)))  # the opcodes


def _storage_sizes(path: str) -> dict[str, int]:
    """Return the bytes of each storage in a zip archive, where torch sees the same archive.

    `zipfile` finds the directory by what lies before the end of the file, torch by the
    offsets written there; torch ignores case.
    """
    with zipfile.ZipFile(path) as archive, open(path, 'rb') as file:
        entries, room = archive.infolist(), file.seek(-98, os.SEEK_END) + 98
        end = file.read()
        unclear = zipfile._EndRecData(file)[6] != archive.start_dir  # type: ignore[attr-defined]
    if end[56:60] == b'PK\6\7':  # of a large archive: where the longer end record is
        unclear |= int.from_bytes(end[64:72], 'little') != room - 98
    sizes = {entry.filename.partition('/')[2].lower(): entry.file_size for entry in entries}
    unclear |= len(sizes) < len(entries) or sum(sizes.values()) > room
    unclear |= any(entry.compress_type or entry.external_attr & 16 for entry in entries)
    if unclear or 'constants.pkl' in sizes:
        raise ValueError('entries that are larger than the file, or a TorchScript program')
    return {name[5:]: size for name, size in sizes.items() if name.startswith('data/')}


def read(path: str, map_location: Any = None) -> Any:
    """Return the content of a file; raise `RefusedError`, or any error if it is damaged."""
    with open(path, 'rb') as file:
        start = file.read(32)
    zipped = start.startswith(b'PK\3\4')
    if not zipped and (_LEGACY not in start[:16] or tarfile.is_tarfile(path)):
        raise ValueError('an unknown format')
    sizes, room = (_storage_sizes(path), 0) if zipped else ({}, os.path.getsize(path))
    kind = type('Unpickler', (_Unpickler,), dict(sizes=sizes, room=room))

    def load(file: Any, **how: Any) -> Any:
        content = kind(file, **how).load()
        if isinstance(content, list) and set(content) != set(sizes):  # the storages that follow
            raise ValueError('other storages than those of its tensors')
        return content

    module = SimpleNamespace(__name__=__name__, Unpickler=kind, load=load)
    return torch.load(path, map_location, module, weights_only=False)
