"""Writing files that are whole or not there at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mmengine.fileio import LocalBackend


@contextmanager
def whole_file(path: str | Path, mode: str = 'wb') -> Iterator[IO]:
    """A file beside ``path`` to write to, which takes its place at the end.

    Whatever happens in between, ``path`` holds what it held before.

    Raises:
        OSError: If it cannot be written; names the disk and what is free on it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{uuid.uuid4().hex}.part')
    try:
        with part.open(mode.replace('w', 'x')) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        kept = ' What the file held before is still there.' if path.exists() else ''
        raise OSError(
            error.errno,
            f'{path} was not written: {error.strerror}. {free / 2**20:.0f} MiB are free on the '
            f'disk mounted at {_mount_point(path.parent)}.{kept}',
        ) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _mount_point(folder: Path) -> Path:
    folder = folder.resolve()
    while not os.path.ismount(folder):
        folder = folder.parent
    return folder


class WholeFileBackend(LocalBackend):
    """MMEngine's backend of local files, with files that are written whole.

    Importing the package registers it in the place of MMEngine's own, so that
    a checkpoint is never half a one: not after a kill, not on a full disk.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; its folder is made."""
        with whole_file(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text to a file; its folder is made."""
        self.put(obj.encode(encoding), filepath)
