"""Files as torch writes them, of good content and bad, and what is read compared."""

import argparse
import collections
import copy
import io
import pickle
import re
import struct
import tarfile
import uuid
import zipfile
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from conftest import SMALL
from lska_mm import LSKAVAN, load_from_local
from lska_mm.weights.names import CheckpointError


class Phase(Enum):
    """As a hook may have one."""

    WARM_UP = 'warm-up'


# What hooks may keep in a message hub.
VALUES = dict(
    times=[datetime(2026, 1, 2, 3, tzinfo=timezone.utc), date(2026, 1, 2), time(3), timedelta(4)],
    paths=[Path('work_dirs/net'), PurePosixPath('/a'), PureWindowsPath('c:/a')],
    numbers=[range(0, 100, 3), Decimal('1.50'), uuid.uuid4(), uuid.uuid1()],
    enumerations=[Phase.WARM_UP, HTTPStatus.OK],
    numpy_times=[np.datetime64('2026-01-02T03', 'h'), np.timedelta64(4, '25s')],
    arrays=[np.array([0, 1], 'M8[D]'), np.array([['a', None], [{'b': 1}, (2,)]], object)],
)  # fmt: skip


def checkpoint():
    """What a training writes, in small, under the published names."""
    state_dict = LSKAVAN(SMALL, 11, out_indices=(0, 1)).state_dict()
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    return dict(
        meta=dict(epoch=1, seed=None),
        state_dict=state_dict,
        message_hub=dict(log_scalars={'loss': buffer}, runtime_info={'x': np.float64(0.5)}),
        optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, betas=(0.9, 0.999)),
        args=argparse.Namespace(model='van', lr=1e-3),
        more=[{1, 2}, frozenset([3]), 1 + 2j, b'bytes', collections.Counter([8]), torch.half],
    )


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path):
    """The message of a file that must not be read."""
    with pytest.raises(CheckpointError) as error:
        load_from_local(str(path), 'cpu')
    message = str(error.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def same(a, b, numbers=True):
    """Whether two contents are equal, of tensors only the shapes where not ``numbers``."""
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return alike and (not numbers or torch.equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key], numbers) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(*pair, numbers) for pair in zip(a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b) and (a.dtype, a.strides) == (b.dtype, b.strides)
    if isinstance(a, (HistoryBuffer, argparse.Namespace)):
        return same(vars(a), vars(b), numbers)
    return a == b


# --- Pickles by hand -----------------------------------------------------------------


def op(value):
    """Instructions that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def name(path):
    module, _, last = path.rpartition('.')
    return f'c{module}\n{last}\n'.encode()


def call(path, *args):
    return name(path) + b'(' + b''.join(args) + b'tR'


def storage(count, key='0'):
    pid = op('storage') + name('torch.FloatStorage') + op(key) + op('cpu') + op(count)
    return b'(' + pid + b'tQ'


def tensor(count, size, stride=(1,), key='0'):
    args = storage(count, key), op(0), op(size), op(stride), op(False)
    return call('torch._utils._rebuild_tensor_v2', *args, call('collections.OrderedDict'))


def pack(code, entries=(), compress=zipfile.ZIP_STORED):
    """A zip file of a pickle's instructions and pairs of a name and bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compress, compresslevel=1) as archive:
        archive.writestr('archive/version', '3\n')
        archive.writestr('archive/data.pkl', b'\x80\x02' + code + b'.' if code else b'')
        for title, data in entries:
            archive.writestr(f'archive/{title}', data)
    return file.getvalue()


def legacy(code, keys=('0',), data=b''):
    """A file of torch before 1.6, with the storages ``keys``."""
    pickles = [0x1950A86A20F9469CFC6C, 1001, {}]
    head = b''.join(pickle.dumps(value, 2) for value in pickles)
    code = code.replace(b'tQ', b'NtQ')  # a storage is not a view of another
    keys = pickle.dumps(list(keys), 2)
    return head + b'\x80\x02' + code + b'.' + keys + (4).to_bytes(8, 'little') + data


def overlapping():
    """One entry that the directory of the archive lists a thousand times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', op(1) + b'.')
        archive.writestr('archive/data/0', bytes(1000))
        for i in range(1, 1000):
            again = copy.copy(archive.filelist[1])
            again.filename = f'archive/data/{i}'
            archive.filelist.append(again)
    return file.getvalue()


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), file)
    return file.getvalue()


def two_directories(whole, *changes):
    """A changed copy of the directory behind the true one: Python reads that, torch this."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        start, count = archive.start_dir, len(archive.filelist)
    end = whole.index(b'PK\6\6' if b'PK\6\6' in whole else b'PK\5\6', start)
    directory = bytearray(whole[start:end])
    for old, new in changes:
        directory = directory.replace(old, new)
    for i in (match.start() for match in re.finditer(b'PK\1\2', directory)):
        directory[i + 10 : i + 12] = bytes(2)  # not compressed
        directory[i + 24 : i + 28] = directory[i + 20 : i + 24]
    sizes = struct.pack('<4H2IH', 0, 0, count, count, end - start, start, 0)
    return whole[:end] + bytes(directory) + b'PK\5\6' + sizes


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    return file.getvalue()
