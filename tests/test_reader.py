"""Files that are damaged, or made to harm: an error each time, and bounded memory."""

import argparse
import collections
import copy
import io
import pickle
import random
import re
import resource
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.logging.history_buffer import HistoryBuffer

from conftest import ROOT, SMALL
from lska_mm import LSKAVAN
from lska_mm.checkpoint import CheckpointError
from lska_mm.loader import load_from_local
from lska_mm.reader import read

SHORT = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LONG = settings(
    max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


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


def pack(pickled, storages=(), compress=zipfile.ZIP_STORED):
    """A file as torch writes it, of any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compress, compresslevel=1) as archive:
        archive.writestr('archive/data.pkl', pickled)
        for i, storage in enumerate(storages):
            archive.writestr(f'archive/data/{i}', storage)
    return file.getvalue()


def refused(path):
    """The message of a file that must not be read."""
    with pytest.raises(CheckpointError) as error:
        load_from_local(str(path))
    assert str(path) in str(error.value)
    return str(error.value)


# --- What is not damaged -----------------------------------------------------------


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b) and (a.dtype, a.strides) == (b.dtype, b.strides)
    if isinstance(a, (HistoryBuffer, argparse.Namespace)):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_what_torch_reads(tmp_path, zipped):
    data = torch.arange(12.0)
    attributed = torch.ones(2)
    attributed.mark = True  # as FSDP does
    content = dict(
        checkpoint(),
        attributed=attributed,
        tensors=[data[2:8].view(2, 3).t(), data, torch.zeros(0, 3), torch.tensor(True)],
        types=[
            torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.complex64)
        ],
        parameter=torch.nn.Parameter(torch.ones(2)),
        arrays=[np.arange(3), np.array(['a', 'bc']), np.zeros((0, 2)), np.eye(2, dtype='f4').T],
    )
    path = save(content, tmp_path / 'file.pth', zipped)
    ours, theirs = read(str(path)), torch.load(path, weights_only=False)
    assert same(ours, theirs)
    assert ours['state_dict']._metadata == content['state_dict']._metadata
    view, whole = ours['tensors'][:2]
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert isinstance(ours['parameter'], torch.nn.Parameter)
    assert read(str(path), 'meta')['parameter'].is_meta if not zipped else True
    save(ours, tmp_path / 'again.pth', zipped)  # as the next checkpoint of a training does
    assert same(torch.load(tmp_path / 'again.pth', weights_only=False), theirs)


# --- Damage ------------------------------------------------------------------------


@pytest.mark.parametrize('number', [50, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.parametrize('zipped', [True, False])
def test_truncated(tmp_path, zipped, number):
    whole = save(checkpoint(), tmp_path / 'whole.pth', zipped).read_bytes()
    path = tmp_path / 'truncated.pth'
    lengths = random.Random(0).sample(range(len(whole)), number)
    for length in lengths:
        path.write_bytes(whole[:length])
        assert 'truncated.pth is damaged' in refused(path)
    print(f'{number} of {number} truncated files refused, {min(lengths)} to {max(lengths)} bytes')


def parts_of_zip(whole):
    """The bytes that are not weights: of headers, the pickle, the directory."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = archive.infolist()
        weights = [e for e in entries if '/data/' in e.filename]
        start = archive.start_dir
    local = [i for e in weights for i in range(e.header_offset, e.header_offset + 30)]
    pickled = next(e for e in entries if e.filename.endswith('data.pkl'))
    return dict(
        local=local,
        pickle=range(pickled.header_offset, pickled.header_offset + pickled.file_size),
        directory=range(start, len(whole)),
        anywhere=range(len(whole)),
    )


@pytest.mark.parametrize('number', [60, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize('part', ['local', 'pickle', 'directory', 'anywhere'])
def test_flipped_bytes_of_a_zip_are_seen_or_do_not_matter(tmp_path, part, number):
    content = checkpoint()
    whole = save(content, tmp_path / 'whole.pth').read_bytes()
    expected = load_from_local(str(tmp_path / 'whole.pth'))
    generator, path, count = random.Random(0), tmp_path / 'flipped.pth', 0
    for _ in range(number):
        data = bytearray(whole)
        data[generator.choice(parts_of_zip(whole)[part])] ^= generator.randrange(1, 256)
        path.write_bytes(data)
        try:
            assert same(load_from_local(str(path)), expected)
        except CheckpointError as error:
            assert 'flipped.pth' in str(error)  # noqa: PT017
            count += 1
    print(f'{part}: {count} of {number} files with a flipped byte refused, the others unchanged')
    assert count > number / 10


# --- Random changes of any kind ------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(['set', 'cut', 'repeat', 'insert']),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def change(data, changes):
    for kind, place, new in changes:
        i = int(place * len(data))
        j = i + len(new) * (3 if kind == 'cut' else 1)
        middle = dict(set=new, cut=b'', repeat=data[i:j] * 2, insert=new + data[i:j])[kind]
        data = data[:i] + middle + data[j:]
    return data


class Fuzz:
    """Changed files, and how many of them were refused."""

    def __init__(self, folder):
        self.path = folder / 'changed.pth'
        self.bases = {}
        for name, zipped in (('zip', True), ('legacy', False)):
            self.bases[name] = save(checkpoint(), folder / name, zipped).read_bytes()
        with zipfile.ZipFile(folder / 'zip') as archive:
            self.pickled = archive.read('zip/data.pkl')
            names = [n for n in archive.namelist() if '/data/' in n]
            self.storages = [archive.read(f'zip/data/{i}') for i in range(len(names))]
        # Weights last, so that changes hit what is not weights.
        self.legacy_head = self.bases['legacy'].index(b'bytes') + 200
        self.tried = self.refused = 0

    def run(self, base, changes):
        if base == 'pickle':  # with its checksum right
            data = pack(change(self.pickled, changes), self.storages)
        elif base == 'legacy':
            whole = self.bases['legacy']
            data = change(whole[: self.legacy_head], changes) + whole[self.legacy_head :]
        else:
            data = change(self.bases['zip'], changes)
        self.path.write_bytes(data)
        self.tried += 1
        try:
            load_from_local(str(self.path))
        except CheckpointError as error:
            assert 'changed.pth' in str(error)  # noqa: PT017
            self.refused += 1


@pytest.mark.parametrize('how', [SHORT, pytest.param(LONG, marks=pytest.mark.soak)])
@pytest.mark.parametrize('base', ['zip', 'legacy', 'pickle'])
def test_changed_files_are_refused_or_read(tmp_path, base, how):
    fuzz = Fuzz(tmp_path)
    how(given(CHANGES)(lambda changes: fuzz.run(base, changes)))()
    print(f'{base}: {fuzz.refused} of {fuzz.tried} changed files refused, the others read')
    assert fuzz.refused > fuzz.tried / 4


# --- Files that are made to harm -----------------------------------------------------


def op(value):
    """Instructions that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def name(path):
    module, _, last = path.rpartition('.')
    return f'c{module}\n{last}\n'.encode()


def call(path, *args):
    return name(path) + b'(' + b''.join(args) + b'tR'


def storage(count, view=b''):
    pid = op('storage') + name('torch.FloatStorage') + op('0') + op('cpu') + op(count) + view
    return b'(' + pid + b'tQ'


def tensor(count, size, stride=(1,)):
    args = storage(count), op(0), op(size), op(stride), op(False), call('collections.OrderedDict')
    return call('torch._utils._rebuild_tensor_v2', *args)


NESTED = b')' + b'2\x86' * 60  # a pair of twice a pair of twice a pair of ...
F8 = call('numpy.dtype', op('f8'), op(False), op(True))
ARRAY = call('numpy.core.multiarray._reconstruct', name('numpy.ndarray'), op((0,)), op('b'))
HISTORY = name('mmengine.logging.history_buffer.HistoryBuffer')


def attributed(function, kind, *args):
    args = b'(' + b''.join(args) + b't'
    return call('torch._tensor._rebuild_from_type_v2', name(function), name(kind), args, op({}))


# The instructions of a pickle, and what the error says; None if it is read in peace.
PICKLES = {
    'a storage of 10**15 numbers': (tensor(10**15, (10**15,)), 'storage 0 has 16 bytes'),
    'a storage of -1 numbers': (tensor(-1, (1,)), 'storage 0 has 16 bytes'),
    'a storage that is not there': (tensor(4, (4,)).replace(b'0q', b'1q', 1), 'KeyError'),
    'a shape beyond its storage': (tensor(4, (10**10,)), 'out of bounds'),
    'a shape beyond all numbers': (tensor(4, (2**40, 2**40), (1, 1)), '.'),
    'one number a million times': (tensor(4, (10**12,), (0,)), '1000000000000 elements on 4'),
    'a negative stride': (tensor(4, (2,), (-1,)), 'strides'),
    'a long bytearray': (call('builtins.bytearray', op(10**12)), 'builtins.bytearray'),
    'a long array': (call('numpy.ndarray', op((10**12,))), 'type out of place'),
    'an array without its data': (
        ARRAY + b'(' + op(1) + op((10**12,)) + F8 + op(False) + op('') + b'tb', '.',
    ),
    'an array of objects': (call('numpy.dtype', op('O8'), op(False), op(True)), 'anything but n'),
    'a changed float64': (
        F8 + b'(' + op(3) + op('>') + b'NNN' + op(-1) + op(-1) + op(0) + b'tb', 'big-endian',
    ),
    'a codec that lengthens': (call('_codecs.encode', op('0' * 9), op('hex')), 'latin1'),
    'a string of an explosion': (call('builtins.str', NESTED), 'type out of place'),
    'a key that is an explosion': (b'}' + NESTED + b'Ns', 'a key of nested tuples'),
    'keys that are explosions': (b'}(' + NESTED + b'Nu', 'a key of nested tuples'),
    'a set of an explosion': (call('builtins.set', b'(' + NESTED + b'l'), 'a key of nested tup'),
    'an attribute that is an explosion': (
        call('builtins.getattr', HISTORY, NESTED), 'getattr of more than',
    ),
    'the name of a storage that is an explosion': (
        b'(' + op('storage') + name('torch.FloatStorage') + NESTED + op('cpu') + op(4) + b'tQ',
        'tuple out of place',
    ),
    'the same list a thousand times': (
        b'(' + b'N' * 5000 + b'lq\0' + (name('collections.deque') + b'h\0\x85R0') * 1000,
        'copies more than it holds',
    ),
    'a million sets': (b'(' + b'\x8f' * 1_000_001 + b'l', 'more than 1000000 instructions'),
    'a long string that is not there': (b'\x8d' + (10**15).to_bytes(8, 'little') + b'x', '.'),
    'a bytearray that is not there': (b'\x96' + (10**12).to_bytes(8, 'little'), 'instruction 150'),
    'an extension': (b'\x82\x01', 'no instruction 130'),
    'a class that is called as a tensor': (
        attributed('os.system', 'torch.Tensor', op('x')), 'os.system',
    ),
    'a function that is called as a tensor': (
        attributed('builtins.set', 'torch.Tensor', NESTED), 'a class of its own',
    ),
    'a type that is called as a tensor': (
        attributed('torch.Tensor', 'torch.Tensor', op(10**12)), 'a class of its own',
    ),
    'a tensor of another class': (
        attributed('torch._utils._rebuild_tensor_v2', 'builtins.dict'), 'a class of its own',
    ),
    'a class of tensors that is called': (
        call('torch.Tensor', op(10**12)), '_TensorMeta out of place',
    ),
    'a method of a tensor': (tensor(4, (4,)) + op((1,)) + b'b', 'Tensor out of place'),
    'a changed tensor': (tensor(4, (4,)) + op(0) + op(1) + b's', 'Tensor out of place'),
    'a new string': (name('builtins.str') + NESTED + b'\x85\x81', 'a new object of another type'),
    'a class of torch': (name('torch.nn.modules.linear.Linear'), 'torch.nn.modules.linear.Linear'),
    'a name that looks like a line of a log': (
        op('os') + op('x\n01/01 INFO - all is well') + b'\x93', r'os\.x\\n01',
    ),
    'a distant place of the memo': (b'Nr\xff\xff\xff\xff', None),
    'a frame that is not there': (b'\x95' + (2**62).to_bytes(8, 'little') + b'N', None),
    'lists in lists': (b']' * 100_000 + b'a' * 99_999, None),
}  # fmt: skip


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


def legacy(pickled, keys=('0',)):
    pickles = [0x1950A86A20F9469CFC6C, 1001, {}]
    head = b''.join(pickle.dumps(value, 2) for value in pickles)
    return head + pickled + b'.' + pickle.dumps(list(keys), 2) + (4).to_bytes(8, 'little')


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    return file.getvalue()


FILES = {
    **{
        title: (lambda code=code: pack(b'\x80\x02' + code + b'.', [bytes(16)]), message)
        for title, (code, message) in PICKLES.items()
    },
    'many zeros, compressed': (
        lambda: pack(tensor(2**24, (2**24,)) + b'.', [bytes(2**26)], zipfile.ZIP_DEFLATED),
        'compressed entries',
    ),
    'entries that overlap': (overlapping, 'larger than the file'),
    'a program of TorchScript': (script, 'compressed entries'),
    'no pickle': (lambda: pack(b''), 'EOFError'),
    'old: a storage of 10**15 numbers': (
        lambda: legacy(tensor(10**15, (10**15,))), 'storages are larger than the file',
    ),
    'old: a storage without its data': (lambda: legacy(tensor(4, (4,))), 'storage of 16 bytes'),
    'old: a storage that is not there': (lambda: legacy(tensor(4, (4,)), '1'), 'other storages'),
    'old: keys that explode': (
        lambda: legacy(op(1))[:-25] + b'(' + NESTED + NESTED + b'l.', 'damaged',
    ),
    'old: code of a class': (
        lambda: legacy(b'(' + op('module') + HISTORY + op('x.py') + op('x') + b'tQ'), '.',
    ),
    'older: a tar file': (tar, 'damaged'),
}  # fmt: skip


@pytest.mark.parametrize('title', FILES)
def test_made_to_harm(tmp_path, title):
    make, expected = FILES[title]
    path = tmp_path / 'made.pth'
    path.write_bytes(make())
    if expected is None:
        load_from_local(str(path))
    else:
        assert re.search(expected, refused(path))


def memory(key):
    """What the kernel says of this process, in MiB."""
    return int(re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024


def measure(folder):
    """How much the peak of memory grows over all of `FILES`, under a limit."""
    paths = {title: Path(folder, f'{i}.pth') for i, title in enumerate(FILES)}
    for title, path in paths.items():
        if not path.exists():
            path.write_bytes(FILES[title][0]())
    limit = int(memory('VmSize') + 1024) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    before, count = memory('VmRSS'), 0
    for path in paths.values():
        try:
            load_from_local(str(path))
        except CheckpointError:
            count += 1
    growth = memory('VmHWM') - before
    print(f'{count} of {len(paths)} files refused, {growth:.0f} MiB more at the peak')


def test_memory_is_bounded(run, tmp_path):
    path = tmp_path / f'{list(FILES).index("many zeros, compressed")}.pth'
    path.write_bytes(FILES['many zeros, compressed'][0]())
    code = f'import test_reader; test_reader.measure({str(tmp_path)!r})'
    printed = run(sys.executable, '-c', code, cwd=ROOT / 'tests')
    print(printed)
    assert float(re.search(r'refused, (\d+) MiB', printed)[1]) < 400
