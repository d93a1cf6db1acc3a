"""Reading what `torch.save` wrote, without running code that it may carry.

A pickle is a program for a small machine that looks functions up by name and
calls them. Here that machine knows only the names that tensors, numbers and
containers are pickled with, calls versions of its own of what they name, and
takes no more memory than the size of the file accounts for. torch's reader
``weights_only`` takes no list of names on torch 2.1, could be made to run code
there (CVE-2025-32434), and allocates what a file claims to hold.

There are two formats: since torch 1.6 a zip archive of ``data.pkl`` and a file for each
storage; before, pickles that the storages follow.
"""

import argparse
import io
import mmap
import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor, nn

# Of one pickle. An instruction makes an object of 216 bytes at most; a tensor takes
# a few dozen of them.
MAX_OPCODES = 1_000_000
MAX_COPIES = 4  # of each byte: a text becomes bytes, and those an array of NumPy

# How files before torch 1.6 begin.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


class RefusedError(pickle.UnpicklingError):
    """Names what a file must not bring along."""


# --- What pickles may call -----------------------------------------------------------


class _Call(NamedTuple):
    """What a pickle may call; not callable itself, so that nothing else does."""

    function: Callable


def _refuse_deep(keys: Iterable) -> Iterable:
    """Let no tuple of tuples be hashed: fifty of them, each twice in the next, take years."""
    keys = list(keys)
    for key in keys:
        parts = key if isinstance(key, (tuple, frozenset)) else ()
        if any(isinstance(part, (tuple, frozenset)) for part in parts):
            raise ValueError('a key of nested tuples')
    return keys


def _encode(text: str = '', encoding: str = 'latin1') -> bytes:
    """How bytes are pickled. Other codecs make long bytes of short ones."""
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise RefusedError('_codecs.encode for another encoding than latin1')
    return text.encode(encoding)


def _ordered_dict(pairs: Iterable = ()) -> OrderedDict:
    pairs = list(pairs)
    _refuse_deep(pair[0] for pair in pairs)
    return OrderedDict(pairs)


def _tensor(
    storage: Tensor,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    """A tensor on a storage, which torch's own version would enlarge to any ``size``."""
    view = storage.as_strided(size, stride, offset)  # checks that it lies within
    if view.numel() > storage.numel():
        raise ValueError(f'a tensor of {view.numel()} elements on {storage.numel()}')
    if metadata:
        raise RefusedError('a conjugated or negated tensor')
    tensor = storage.new_empty(0).set_(storage.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(data: Tensor, requires_grad: bool = True, hooks: Any = None) -> nn.Parameter:
    return nn.Parameter(data, requires_grad)


def _without_attributes(rebuild: _Call, kind: Any, args: tuple, attributes: Any) -> Tensor:
    """A tensor that had attributes of its own, as FSDP leaves them."""
    if not isinstance(rebuild, _Call) or rebuild.function is not _tensor or kind is not Tensor:
        raise RefusedError('a tensor of a class of its own')
    return _tensor(*args)


class _Dtype:
    """A dtype of NumPy; its own ``__setstate__`` can alter what all arrays share."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufcSU]\d{1,4}', code):
            raise RefusedError('a NumPy array of anything but numbers and text')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ('|', '<'):
            raise RefusedError('a NumPy array of a big-endian machine')


class _Array(np.ndarray):
    """An array that is filled only with what `_Dtype` let through."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        super().__setstate__((1, shape, dtype.dtype, fortran, data))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # for the next checkpoint


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _history_method(owner: type, name: str) -> Any:
    """Stands in for `getattr`, which MMEngine's logs are pickled with."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise RefusedError('getattr of more than the statistics of a HistoryBuffer')
    return getattr(HistoryBuffer, name)


_STORAGES = dict(
    Float=torch.float32, Double=torch.float64, Half=torch.float16, BFloat16=torch.bfloat16,
    Byte=torch.uint8, Char=torch.int8, Short=torch.int16, Int=torch.int32, Long=torch.int64,
    Bool=torch.bool, ComplexFloat=torch.complex64, ComplexDouble=torch.complex128,
)  # fmt: skip
_NAMES: dict[str, Any] = {
    # Types, which may be mentioned, but not called.
    **{f'builtins.{kind.__name__}': kind for kind in (dict, float, int, list, str, tuple)},
    'argparse.Namespace': argparse.Namespace,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'numpy.ndarray': np.ndarray,
    'torch.Tensor': Tensor,
    'torch.storage.UntypedStorage': torch.uint8,
    **{f'torch.{name}Storage': dtype for name, dtype in _STORAGES.items()},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    # Functions.
    'builtins.bytes': _Call(_encode),
    'builtins.complex': _Call(complex),
    'builtins.frozenset': _Call(lambda items=(): frozenset(_refuse_deep(items))),
    'builtins.getattr': _Call(_history_method),
    'builtins.set': _Call(lambda items=(): set(_refuse_deep(items))),
    'builtins.slice': _Call(slice),
    '_codecs.encode': _Call(_encode),
    'collections.Counter': _Call(lambda counts=(): Counter(dict(counts))),
    'collections.OrderedDict': _Call(_ordered_dict),
    'collections.defaultdict': _Call(lambda kind=None: defaultdict(kind)),
    'collections.deque': _Call(deque),
    'numpy.dtype': _Call(_Dtype),
    'numpy.multiarray._reconstruct': _Call(lambda *_: _Array(0)),
    'numpy.multiarray.scalar': _Call(_scalar),
    'torch.Size': _Call(torch.Size),
    'torch.device': _Call(torch.device),
    'torch._tensor._rebuild_from_type_v2': _Call(_without_attributes),
    'torch._utils._rebuild_parameter': _Call(_parameter),
    'torch._utils._rebuild_tensor': _Call(_tensor),
    'torch._utils._rebuild_tensor_v2': _Call(_tensor),
    'torch.nn.parameter.Parameter': _Call(_parameter),
}


# --- The machine ---------------------------------------------------------------------


class _Opcodes(dict):
    """The machine's instructions; counts those that it hands out."""

    count = 0

    def __getitem__(self, code: int) -> Callable:
        self.count += 1
        if self.count > MAX_OPCODES:
            raise RefusedError(f'a pickle of more than {MAX_OPCODES} instructions')
        if code not in self:
            raise ValueError(f'no instruction {code}')
        return super().__getitem__(code)


# Of Python's two unpicklers the one in Python: that in C has no instructions to
# override, and makes room for as many objects as a file says there will be.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    """Builds tensors, numbers and containers, and nothing that could act."""

    dispatch = dict(_PythonUnpickler.dispatch)
    # Other ways to call something, and buffers of any size.
    for name in (
        'EXT1', 'EXT2', 'EXT4', 'INST', 'OBJ', 'NEWOBJ_EX', 'PERSID',
        'BYTEARRAY8', 'NEXT_BUFFER', 'READONLY_BUFFER',
    ):  # fmt: skip
        del dispatch[getattr(pickle, name)[0]]

    def __init__(self, file: Any, size: int, read_storage: Callable | None = None):
        super().__init__(file, encoding='utf-8')
        self.dispatch = _Opcodes(self.dispatch)
        self.spare = MAX_COPIES * size
        self.read_storage = read_storage
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for here."""
        path = re.sub(r'^__builtin__\.', 'builtins.', f'{module}.{name}')
        path = re.sub(r'^numpy\._?core\.', 'numpy.', path)
        if path not in _NAMES:
            raise RefusedError(path)
        return _NAMES[path]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor."""
        kind, dtype, key, location, count, *view = pid
        if kind != 'storage' or any(view) or not self.read_storage:
            raise ValueError('a storage is expected')
        _expect_types((dtype, torch.dtype), (key, str), (location, str), (count, int))
        if key not in self.storages:
            self.storages[key] = self.read_storage(dtype, key, location, count)
        if self.storages[key].dtype != dtype:
            raise ValueError(f'storage {key} has two types')
        return self.storages[key]

    def load_global(self) -> None:
        """Look a name up."""
        module, name = self.readline(), self.readline()
        if not name.endswith(b'\n'):
            raise EOFError('cut off in a name')
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_reduce(self) -> None:
        """Call a function."""
        args = self.stack.pop()
        call = self.stack.pop()
        _expect_types((call, _Call))
        self._spend(args)
        self.append(call.function(*args))

    def load_newobj(self) -> None:
        """Make an object without calling its ``__init__``."""
        kind, args = self.stack[-2:]
        if not any(kind is known for known in (argparse.Namespace, HistoryBuffer)) or args != ():
            raise ValueError('a new object of another type')
        super().load_newobj()

    def load_build(self) -> None:
        """Give an object its attributes."""
        target, state = self.stack[-2:]
        if isinstance(target, nn.Parameter):  # by torch before 0.4
            target.requires_grad_(state[0])
            self.stack.pop()
            return
        if isinstance(target, (_Array, _Dtype)):
            self._spend(state)
        else:
            _expect_types(
                (target, (argparse.Namespace, HistoryBuffer, OrderedDict)), (state, dict)
            )
            self._spend([state])
        super().load_build()

    def _spend(self, args: Iterable) -> None:
        """Count what is copied: all of it stands in the file."""
        sized = (str, bytes, list, tuple, dict, set, frozenset, deque)
        self.spare -= sum(len(arg) for arg in args if isinstance(arg, sized))
        if self.spare < 0:
            raise ValueError('it copies more than it holds')

    def load_append(self) -> None:
        """Add a value to a list."""
        _expect_types((self.stack[-2], (list, deque)))
        super().load_append()

    def load_appends(self) -> None:
        """Add values to a list."""
        _expect_types((self.metastack[-1][-1], (list, deque)))
        super().load_appends()

    def load_setitem(self) -> None:
        """Add a value to a dict."""
        _expect_types((self.stack[-3], dict))
        _refuse_deep(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Add values to a dict."""
        _expect_types((self.metastack[-1][-1], dict))
        _refuse_deep(self.stack[::2])
        super().load_setitems()

    def load_additems(self) -> None:
        """Add values to a set."""
        _expect_types((self.metastack[-1][-1], set))
        _refuse_deep(self.stack)
        super().load_additems()

    def load_dict(self) -> None:
        """Make a dict."""
        _refuse_deep(self.stack[::2])
        super().load_dict()

    def load_frozenset(self) -> None:
        """Make a frozenset."""
        _refuse_deep(self.stack)
        super().load_frozenset()

    for name, method in list(vars().items()):
        if name.startswith('load_'):
            dispatch[getattr(pickle, name[5:].upper())[0]] = method


def _expect_types(*pairs: tuple[Any, Any]) -> None:
    for value, kinds in pairs:
        if not isinstance(value, kinds):
            raise ValueError(f'{type(value).__name__} out of place')


# --- The two formats -----------------------------------------------------------------


def read(path: str, map_location: Any = None) -> Any:
    """Read a file that `torch.save` wrote.

    Args:
        path: The file.
        map_location: As for `torch.load`.

    Raises:
        RefusedError: If it holds anything but tensors, numbers and containers.
        Exception: Of any kind, if the file is damaged or made to harm.
    """
    restore = torch.serialization._get_restore_location(map_location)

    def allocate(dtype: torch.dtype, location: str, count: int) -> Tensor:
        storage = restore(torch.UntypedStorage(count * dtype.itemsize), location)
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)

    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b'PK\x03\x04':
            return _read_zip(file, len(data), allocate)
        return _read_legacy(data, allocate)


def _fill(storage: Tensor, data: bytes) -> None:
    if len(data) != storage.nbytes:
        raise EOFError(f'a storage of {storage.nbytes} bytes has {len(data)}')
    if data:
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        storage.untyped_storage().copy_(source.untyped_storage())


def _read_zip(file: Any, size: int, allocate: Callable) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch packs nothing; what is packed, or lies in the file twice, may be a bomb.
        if any(entry.compress_type or entry.file_size != entry.compress_size
               for entry in entries.values()):  # fmt: skip
            raise ValueError('compressed entries')
        if sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError('the entries are larger than the file')
        [root] = [name[:-8] for name in entries if name.endswith('/data.pkl')]
        if f'{root}byteorder' in entries and archive.read(f'{root}byteorder') != b'little':
            raise ValueError('of a big-endian machine')

        def read_storage(dtype: torch.dtype, key: str, location: str, count: int) -> Tensor:
            entry = entries[f'{root}data/{key}']
            if entry.file_size != count * dtype.itemsize:
                raise ValueError(f'storage {key} has {entry.file_size} bytes, not {count} numbers')
            storage = allocate(dtype, location, count)
            _fill(storage, archive.read(entry))
            return storage

        pickled = archive.read(f'{root}data.pkl')
        return _Unpickler(io.BytesIO(pickled), len(pickled), read_storage).load()


def _read_legacy(data: mmap.mmap, allocate: Callable) -> Any:
    def load() -> Any:
        return _Unpickler(data, len(data)).load()

    if (load(), load()) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise ValueError('no magic number')
    load()  # of the machine that wrote it
    spare = len(data)

    def read_storage(dtype: torch.dtype, key: str, location: str, count: int) -> Tensor:
        nonlocal spare
        spare -= count * dtype.itemsize
        if not 0 <= spare < len(data) + 1:
            raise ValueError('the storages are larger than the file')
        return allocate(dtype, location, count)

    unpickler = _Unpickler(data, len(data), read_storage)
    content = unpickler.load()
    keys = load()
    _expect_types((keys, list), *((key, str) for key in keys))
    if sorted(keys) != sorted(unpickler.storages):
        raise ValueError('other storages than announced')
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(data.read(8), 'little') != storage.numel():
            raise ValueError(f'storage {key} has another size than announced')
        _fill(storage, data.read(storage.nbytes))
    return content
