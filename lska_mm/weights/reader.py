"""Read files of `torch.save` with `torch.load`, without running code that they may contain.

A pickle refers to what it calls by name. Names in `_ALLOWED`, and members of enumerations that
are imported already, are accepted; anything else is refused.
"""

import argparse
import os
import pickle
import re
import sys
import tarfile
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import EnumMeta
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from .archive import storage_sizes
from .names import RefusedError

_LEGACY = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # near the start of files before torch 1.6
_METHODS = {HistoryBuffer: ('min', 'max', 'mean', 'current'),
            OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')}  # fmt: skip
_TIME = r"\(4, '<', None, None, None, -1, -1, 0, \({}, \(b'\w+', [1-9]\d{,8}, 1, 1\)\)\)"  # unit


def _tensor(storage, offset, size, stride, grad=False, hooks=None, metadata=None):
    """Rebuild a tensor; torch itself would enlarge the storage to any ``size``."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    bound = 0 not in size and storage._untyped_storage.device.type != 'meta'
    if bound and not 0 <= offset <= last < storage._size():
        raise ValueError(f'a tensor of {size} on a storage of {storage._size()}')
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, grad, {}, metadata)


def _checked(make, is_harmless):
    def call(*args):
        if is_harmless(*args):
            return make(*args)
        raise RefusedError(f'{make.__module__}.{make.__name__}{args!r:.90}')

    return call


_CLASSES = (argparse.Namespace, HistoryBuffer, OneCycleParamScheduler, ConfigDict, Counter,
            OrderedDict, PurePosixPath, PureWindowsPath, UUID, complex, date, datetime,
            defaultdict, deque, dict, float, frozenset, int, list, set, slice, time, timedelta,
            timezone, torch.Size, torch.device)  # fmt: skip
_BUILT = (argparse.Namespace, HistoryBuffer, OrderedDict, UUID, np.ndarray)
_ALLOWED: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind for kind in _CLASSES},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **dict.fromkeys(('pathlib.PosixPath', 'pathlib.WindowsPath'), Path),
    # Limits the size of a list or an int made from these.
    'builtins.range': _checked(range, lambda *args: len(range(*args)) <= 10**6),
    'decimal.Decimal': _checked(Decimal, lambda *args: abs(Decimal(*args).adjusted()) <= 10**4),
    'builtins.getattr': _checked(getattr, lambda kind, name: name in _METHODS.get(kind, ())),
    'builtins.bytes': lambda: b'',
    '_codecs.encode': lambda text, _: text.encode('latin1'),  # how bytes are pickled
    'numpy.dtype': _checked(
        np.dtype, lambda code, *new: re.fullmatch(r'[?biufcSUOmM]\d*', code) and new == (0, 1)
    ),
    'numpy.multiarray._reconstruct': lambda *_: np.empty(0),
    'numpy.multiarray.scalar': np.float64().__reduce__()[0],
    **dict.fromkeys(('numpy.ndarray', 'torch.Tensor')),  # only as arguments of others
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._tensor._rebuild_from_type_v2': lambda function, kind, args, attributes: _tensor(*args),
}
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # in Python, so that its steps can be checked


class _Unpickler(_Base):
    dispatch = dict(_Base.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # of any size
    sizes, room = dict[str, int](), 0  # bytes of each storage, and of the file for others

    def find_class(self, module, name):
        path = re.sub(r'^__builtin__\.x?', 'builtins.', f'{module}.{name}')
        path = re.sub(r'^numpy\._?core\.', 'numpy.', path)
        if path in _ALLOWED:
            return _ALLOWED[path]
        kind = getattr(sys.modules.get(module), '__dict__', {}).get(name)
        if not isinstance(kind, EnumMeta):
            raise RefusedError(path)
        return kind._value2member_map_.__getitem__  # calling the class could run its code

    def load_global(self):
        module, name = self.readline(), self.readline()
        if not name.endswith(b'\n'):
            raise EOFError('cut off in a name')
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_build(self):
        *_, target, state = self.stack
        if isinstance(target, HistoryBuffer):  # its class has these methods anyway
            state.pop('statistics_methods', None)
        if isinstance(target, np.ndarray) and state[-3].hasobject:  # numpy reads beyond the list
            count, shape = len(state[-1]), state[-4]
            if np.empty(count, bool).reshape(shape).shape != shape:
                raise ValueError(f'{count} objects in an array of {shape}')
        is_dtype = isinstance(target, np.dtype)
        if is_dtype and target.kind not in 'mM' and state[1] in ('|', '<'):
            self.stack.pop()  # which adds nothing
        elif isinstance(target, _BUILT) or (is_dtype and re.fullmatch(_TIME, repr(state))):
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


def read(path: str, map_location: Any = None) -> Any:
    """Return the content of a file; raise `RefusedError`, or any error if it is damaged."""
    with open(path, 'rb') as file:
        start = file.read(32)
    zipped = start.startswith(b'PK\3\4')
    if not zipped and (_LEGACY not in start[:16] or tarfile.is_tarfile(path)):
        web = start.lstrip()[:1] == b'<'
        raise ValueError('a web page, not the file' if web else 'an unknown format')
    sizes, room = (storage_sizes(path), 0) if zipped else ({}, os.path.getsize(path))
    kind = type('Unpickler', (_Unpickler,), dict(sizes=sizes, room=room))

    def load(file: Any, **how: Any) -> Any:
        content = kind(file, **how).load()
        if isinstance(content, list) and set(content) != set(sizes):  # the storages that follow
            raise ValueError('other storages than those of its tensors')
        return content

    module = SimpleNamespace(__name__=__name__, Unpickler=kind, load=load)
    return torch.load(path, map_location, module, weights_only=False)
