"""Files that are damaged, in one place or many: an error each time, and in time."""

import io
import random
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer

from lska_mm import load_from_local
from lska_mm.weights.names import CheckpointError
from pickles import checkpoint, pack, refused, same, save

SHORT = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LONG = settings(
    max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _own_statistics(monkeypatch):
    """A file brings along what all logs of the process then have."""
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})


@pytest.mark.parametrize(
    ('zipped', 'number'),
    [
        (True, 50),
        (False, 50),
        pytest.param(True, 5000, marks=pytest.mark.soak),
        pytest.param(False, 5000, marks=pytest.mark.soak),
    ],
)
def test_truncated(tmp_path, zipped, number):
    whole = save(checkpoint(), tmp_path / 'whole.pth', zipped).read_bytes()
    path = tmp_path / 'truncated.pth'
    lengths = random.Random(0).sample(range(len(whole)), number)
    for length in [0, *lengths, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert 'truncated.pth is damaged' in refused(path)
    print(f'{number} of {number} truncated files refused, {min(lengths)} to {max(lengths)} bytes')


def test_truncated_in_a_name(tmp_path):
    whole = save(checkpoint(), tmp_path / 'truncated.pth', zipped=False).read_bytes()
    (tmp_path / 'truncated.pth').write_bytes(whole[: whole.index(b'OrderedDict') + 5])
    assert 'truncated.pth is damaged' in refused(tmp_path / 'truncated.pth')


def parts_of_zip(whole):
    """Which bytes are what."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = archive.infolist()
        start = archive.start_dir
    pickled = next(e for e in entries if e.filename.endswith('data.pkl'))
    weights = [e for e in entries if '/data/' in e.filename]
    assert all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    return dict(
        directory=range(start, len(whole)),
        local=[i for e in weights for i in range(e.header_offset, e.header_offset + 30)],
        weights=range(weights[0].header_offset, weights[-1].header_offset),
        pickle=range(pickled.header_offset, pickled.header_offset + pickled.file_size),
    )


@pytest.mark.parametrize('number', [60, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize('part', ['directory', 'local', 'weights', 'pickle'])
def test_flipped_bytes_of_a_zip(tmp_path, part, number):
    """They are seen or change numbers only, or the pickle: torch compares no checksums."""
    whole = save(checkpoint(), tmp_path / 'whole.pth').read_bytes()
    expected = load_from_local(str(tmp_path / 'whole.pth'))
    places = parts_of_zip(whole)[part]
    generator, path, count = random.Random(0), tmp_path / 'flipped.pth', 0
    for _ in range(number):
        data = bytearray(whole)
        data[generator.choice(places)] ^= generator.randrange(1, 256)
        path.write_bytes(data)
        try:
            content = load_from_local(str(path))
        except CheckpointError as error:
            assert 'flipped.pth' in str(error)  # noqa: PT017
            count += 1
        else:
            assert part == 'pickle' or same(content, expected, numbers=False)
    print(f'{part}: {count} of {number} files with a flipped byte refused')
    assert part == 'weights' or count > number / 10


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
            self.pickled = archive.read('zip/data.pkl')[2:-1]
            names = [name for name in archive.namelist() if '/data/' in name]
            self.storages = [(n.removeprefix('zip/'), archive.read(n)) for n in names]
        # Weights last, so that changes hit what is not weights.
        self.legacy_head = self.bases['legacy'].index(b'bytes') + 200
        self.tried = self.refused = 0

    def run(self, base, changes):
        if base == 'pickle':
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
