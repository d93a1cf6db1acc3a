"""Files that are made to harm: refused with a line, and in bounded memory."""

import re
import resource
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mmengine.logging import HistoryBuffer

from conftest import ROOT
from lska_mm import load_from_local
from lska_mm.weights.names import CheckpointError
from pickles import (
    call,
    legacy,
    name,
    op,
    overlapping,
    pack,
    refused,
    script,
    storage,
    tar,
    tensor,
    two_directories,
)  # fmt: skip

UNKNOWN = r'was refused: it holds {}, and loading that could run code.*NO_WEIGHTS_ONLY_LOAD=1'
REFUSED = 'made.pth'  # whatever the reason
WEIGHTS = ('data/0', bytes(16))
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
F8 = call('numpy.dtype', op('f8'), op(False), op(True))
ARRAY = call('numpy.core.multiarray._reconstruct', name('numpy.ndarray'), op((0,)), op('b'))


def attributed(function, kind, *args):
    args = b'(' + b''.join(args) + b't'
    return call('torch._tensor._rebuild_from_type_v2', name(function), name(kind), args, op({}))


def attribute(target):
    """Give an object, found by its name, an attribute."""
    return name(target) + op({'harm': 1}) + b'b'


def dtype(code, *state):
    """A type of numpy with a state, of which the units of a time are a part."""
    made = call('numpy.dtype', op(code), op(False), op(True))
    return made + b'(' + b''.join(map(op, (*state, None, None, None, -1, -1)))


def times(unit, number=1):
    return dtype('M8', 4, '<') + op(0) + op(({}, (unit, number, 1, 1))) + b'tb'


def objects(shape):
    """An array of objects that lists one."""
    return ARRAY + b'(' + op(1) + op(shape) + dtype('O8', 3, '|') + op(63) + b'tb' + (
        op(False) + op([None]) + b'tb'
    )  # fmt: skip


# The instructions of a pickle, and what the error says; None if it is read in peace.
PICKLES = {
    **{
        title: (call(title, *args), UNKNOWN.format(re.escape(title)))
        for title, args in {
            'os.system': [op('true')],
            'posix.mkdir': [op('harm')],
            'builtins.eval': [op('1')],
            'builtins.exec': [op('1')],
            'builtins.__import__': [op('os')],
            'builtins.bytearray': [op(10**12)],
            'torch.load': [op('harm.pth')],
            'torch.nn.modules.linear.Linear': [op(1), op(1)],
            'functools.partial': [name('builtins.dict')],
        }.items()
    },
    'getattr of another class': (
        call('builtins.getattr', name('builtins.dict'), op('get')),
        UNKNOWN.format(r'builtins\.getattr.*get..'),
    ),
    'getattr of something else': (
        call('builtins.getattr', name(HISTORY), op('__init__')),
        UNKNOWN.format(r'builtins\.getattr.*init__..'),
    ),
    'a dotted name': (
        op(HISTORY.rpartition('.')[0]) + op('HistoryBuffer.__init__') + b'\x93',
        UNKNOWN.format('.*__init__'),
    ),
    'a name that looks like a line of a log': (
        op('os') + op('x\n01/01 INFO - all is well') + b'\x93', r'os\.x\\n01',
    ),
    'an extension': (b'\x82\x01', 'damaged'),
    'an attribute of a class': (attribute(HISTORY), UNKNOWN.format('attributes of <class.*')),
    'an attribute of a function': (
        attribute('builtins.getattr'), UNKNOWN.format('attributes of <function.*'),
    ),
    'an attribute of a tensor': (
        tensor(4, (4,)) + op({'harm': 1}) + b'b', UNKNOWN.format('attributes of tensor.*'),
    ),
    'a structured array': (
        call('numpy.dtype', op('i4,O'), op(False), op(True)), UNKNOWN.format(r'numpy\.dtype.*'),
    ),
    'a type that others share': (
        call('numpy.dtype', op('M8'), op(False), op(False)), UNKNOWN.format(r'numpy\.dtype.*'),
    ),
    'objects beyond their list': (objects((10**9,)), '1 objects in an array|cannot reshape'),
    'a negative number of objects': (objects((-1,)), r'1 objects in an array of \(-1,\)'),
    'times without a unit': (times("b'harm'"), UNKNOWN.format('attributes of dtype.*')),
    'times of another unit': (times(b'harm'), 'damaged'),
    'times of a zeroth': (times(b's', 0), UNKNOWN.format('attributes of dtype.*')),
    'times of 2**32 seconds': (times(b's', 2**32), UNKNOWN.format('attributes of dtype.*')),
    'a list of a long range': (
        call('builtins.list', call('__builtin__.xrange', op(10**9))),
        UNKNOWN.format('builtins.range.1000000000,.'),
    ),
    'a range that is longer than any list': (call('builtins.range', op(10**99)), 'damaged'),
    'an integer of a billion digits': (
        call('builtins.int', call('decimal.Decimal', op('-1e999999999'))),
        UNKNOWN.format('decimal.Decimal.*'),
    ),
    'a class made by an enumeration': (call('enum.Enum', op('Harm'), op('a')), 'damaged'),
    'a value that an enumeration lacks': (call('http.HTTPStatus', op(1)), 'damaged'),
    'an attribute of an enumeration': (
        attribute('http.HTTPStatus'), UNKNOWN.format('attributes of .*'),
    ),
    'an enumeration that is not imported': (
        call('this.Enumeration', op(1)), UNKNOWN.format('this.Enumeration'),
    ),
    'a changed float64': (
        F8 + b'(' + op(3) + op('>') + b'NNN' + op(-1) + op(-1) + op(0) + b'tb',
        UNKNOWN.format(r'attributes of dtype.*'),
    ),
    'an array without its data': (
        ARRAY + b'(' + op(1) + op((10**12,)) + F8 + op(False) + op('') + b'tb', 'damaged',
    ),
    'a long array': (call('numpy.ndarray', op((10**12,))), 'damaged'),
    'a long tensor': (call('torch.Tensor', op(10**12)), 'damaged'),
    'a class that is called as a tensor': (
        attributed('os.system', 'torch.Tensor', op('true')), UNKNOWN.format(r'os\.system'),
    ),
    'a tensor of another class': (
        attributed('torch._utils._rebuild_tensor_v2', 'torch.nn.modules.linear.Linear'),
        UNKNOWN.format(r'torch\.nn\.modules\.linear\.Linear'),
    ),
    'a storage of 10**15 numbers': (tensor(10**15, (1,)), 'a storage of 4000000000000000 bytes'),
    'a storage of a number more': (tensor(5, (4,)), 'a storage of 20 bytes'),
    'a storage of -1 numbers': (tensor(-1, (1,)), 'a storage of -4 bytes'),
    'a storage that is not there': (tensor(4, (4,), key='1'), 'a storage of 16 bytes'),
    'a shape beyond its storage': (tensor(4, (10**10,)), 'a tensor of .10000000000,. on a stor'),
    'a shape beyond all numbers': (tensor(4, (2**40, 2**40), (1, 1)), 'a tensor of .109951162777'),
    'a shape without strides': (tensor(4, (10**10,), ()), 'damaged'),
    'a negative shape': (tensor(4, (-1, 5), (1, 1)), 'damaged'),
    'a negative stride': (tensor(4, (2,), (-1,)), 'a tensor of .2,. on a storage of 4'),
    'negative and positive strides': (tensor(4, (2, 2), (-1, 2)), 'damaged'),
    'a long string that is not there': (b'\x8d' + (10**15).to_bytes(8, 'little') + b'x', 'damag'),
    'a distant place of the memo': (b'Nr\xff\xff\xff\xff', None),
    'a frame that is not there': (b'\x95' + (2**62).to_bytes(8, 'little') + b'N', None),
    'lists in lists': (b']' * 100_000 + b'a' * 99_999, None),
}  # fmt: skip


SIXTEEN, MORE = struct.pack('<II', 16, 16), struct.pack('<II', 20, 20)
FILES = {
    **{
        title: (lambda code=code: pack(code, [WEIGHTS]), message)
        for title, (code, message) in PICKLES.items()
    },
    'many zeros, compressed': (
        lambda: pack(tensor(2**24, (2**24,)), [('data/0', bytes(2**26))], zipfile.ZIP_DEFLATED),
        'entries that are larger than the file',
    ),
    'entries that overlap': (overlapping, 'entries that are larger than the file'),
    'a program of TorchScript': (script, 'a TorchScript program'),
    'no pickle': (lambda: pack(b''), 'EOFError'),
    'old: a storage of 10**15 numbers': (
        lambda: legacy(tensor(10**15, (1,))), 'a storage of 4000000000000000 bytes',
    ),
    'old: storages that together are larger': (
        lambda: legacy(b'(' + storage(100, '1') + storage(100, '2') + b't'), 'a storage of 400 b',
    ),
    'old: a storage of -1 numbers': (lambda: legacy(tensor(-1, (1,))), 'damaged'),
    'old: a storage without its data': (lambda: legacy(tensor(4, (4,))), 'damaged'),
    'old: a storage that is not there': (lambda: legacy(tensor(4, (4,)), '1'), 'damaged'),
    'old: code of a class': (
        lambda: legacy(b'(' + op('module') + name(HISTORY) + op('x.py') + op('x') + b'tQ'),
        'damaged',
    ),
    'older: a tar file': (tar, 'an unknown format'),
    # Of more than one meaning: torch would read beyond its memory, or run a program.
    'an entry whose name ends like another': (
        lambda: pack(tensor(5, (5,)), [WEIGHTS, ('data/x/data/0', bytes(20))]), REFUSED,
    ),
    'two entries of one name': (
        lambda: pack(tensor(5, (5,)), [WEIGHTS, ('data/0', bytes(20))]), REFUSED,
    ),
    'names that differ in case': (
        lambda: pack(tensor(5, (5,), key='A'), [('data/a', bytes(16)), ('data/A', bytes(20))]),
        REFUSED,
    ),
    'two directories': (
        lambda: two_directories(
            pack(tensor(5, (5,)), [WEIGHTS, ('x', bytes(20))]), (SIXTEEN, MORE)
        ),
        REFUSED,
    ),
    'a program in one of two directories': (
        lambda: two_directories(script(), (b'constants.pkl', b'constants.pkX')), REFUSED,
    ),
    'old: a storage that is not listed': (lambda: legacy(tensor(4, (4,)), ''), REFUSED),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('title', FILES)
def test_made_to_harm(tmp_path, monkeypatch, title):
    monkeypatch.chdir(tmp_path)
    make, expected = FILES[title]
    path = tmp_path / 'made.pth'
    path.write_bytes(make())
    if expected is None:
        load_from_local(str(path))
    else:
        assert re.search(expected, refused(path))
    assert list(tmp_path.iterdir()) == [path]
    assert not hasattr(HistoryBuffer, 'harm')
    assert np.dtype('f8').isnative


def test_a_log_does_not_change_all_logs(tmp_path):
    before = dict(HistoryBuffer([1.0], [1])._statistics_methods)
    state = op({'statistics_methods': {'mean': dict}, '_log_history': [], '_count_history': []})
    path = tmp_path / 'made.pth'
    path.write_bytes(pack(b'\x80\x02' + name(HISTORY) + b')\x81' + state + b'b.'))
    assert isinstance(load_from_local(str(path)), HistoryBuffer)
    assert HistoryBuffer._statistics_methods == before


# --- Memory --------------------------------------------------------------------------


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
    code = f'import test_harm; test_harm.measure({str(tmp_path)!r})'
    printed = run(
        sys.executable, '-c', code, cwd=Path(__file__).parent, PYTHONPATH=str(ROOT / 'tests')
    )
    print(printed)
    assert float(re.search(r'refused, (\d+) MiB', printed)[1]) < 400
