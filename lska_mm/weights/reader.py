"""Read what `torch.save` wrote, by `torch.load`, without running code that it may carry.

A pickle names the functions that it calls, and finds those of `allowed`; any other is refused.
"""

import argparse
import os
import pickle
import re
import tarfile
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .allowed import ALLOWED
from .archive import storage_sizes
from .names import RefusedError

_LEGACY = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # near the start of files before torch 1.6


_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # in Python: its steps can be checked


class _Unpickler(_Base):
    dispatch = dict(_Base.dispatch)
    sizes: dict[str, int] = {}  # of the storages, in bytes
    room = 0  # bytes of the file for storages that it does not list

    def find_class(self, module, name):
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        path = re.sub(r'^numpy\._?core\.', 'numpy.', path)
        if path not in ALLOWED:
            raise RefusedError(path)
        return ALLOWED[path]

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

    dispatch[pickle.GLOBAL[0]] = load_global
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINPERSID[0]] = load_binpersid
    del dispatch[pickle.BYTEARRAY8[0]]  # of any size


def read(path: str, map_location: Any = None) -> Any:
    """Return the content of a file; raise `RefusedError`, or any error if it is damaged."""
    with open(path, 'rb') as file:
        start = file.read(32)
    zipped = start.startswith(b'PK\3\4')
    if not zipped and (_LEGACY not in start[:16] or tarfile.is_tarfile(path)):
        raise ValueError('an unknown format')
    sizes, room = (storage_sizes(path), 0) if zipped else ({}, os.path.getsize(path))
    kind = type('Unpickler', (_Unpickler,), dict(sizes=sizes, room=room))

    def load(file: Any, **how: Any) -> Any:
        content = kind(file, **how).load()
        if isinstance(content, list) and set(content) != set(sizes):  # the storages that follow
            raise ValueError('other storages than those of its tensors')
        return content

    module = SimpleNamespace(__name__=__name__, Unpickler=kind, load=load)
    return torch.load(path, map_location, module, weights_only=False)
