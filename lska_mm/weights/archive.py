"""The zip archives of `torch.save`, which Python and torch may read differently."""

import os
import zipfile


def storage_sizes(path: str) -> dict[str, int]:
    """Return the bytes of each storage in a zip archive, if torch reads it the same way.

    `zipfile` finds the directory from the end of the file, torch from the offsets written
    there; torch ignores case.
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
