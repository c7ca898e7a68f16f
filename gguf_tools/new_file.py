"""Files that appear whole or not at all.

One that takes another's place stands for it, as with pyengine.whole_file, which these tools do without: symbolic links
go on leading to it; its mode and, where root writes, its owner stay.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gguf_tools.errors import RequestError

_BUFFER = 1 << 20  # gathers small writes; larger ones go past it


@contextlib.contextmanager
def new_file(path: Path, n_bytes: int, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write; it gets its name when the block ends without an error and all its bytes are on disk.

    Until then it has a temporary name in the same folder, which no error and no Ctrl-C leaves behind.

    Args:
        path: the name it will have, or a link to that.
        n_bytes: how large it will be, to see beforehand whether it fits the disk.
        force: replace a file of that name.

    Raises:
        RequestError: the name is taken, or is no regular file's, or the disk is too full.
        OSError: writing failed.
    """
    path = Path(os.path.realpath(path))
    check_free(path, force=force)
    folder = path.parent
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise RequestError(f"{path} needs {n_bytes / 1e9:.2f} GB, and the disk has only {free / 1e9:.2f} GB free")
    temporary = folder / f".{path.name}.{os.getpid()}.part"
    try:  # from here on: Ctrl-C may arrive as soon as the file is there
        with temporary.open("wb", buffering=_BUFFER) as file:
            _stand_for(path, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_free(path, force=force)  # someone else may have made it meanwhile
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def _stand_for(path: Path, descriptor: int) -> None:
    if path.exists():
        old = path.stat()
        with contextlib.suppress(OSError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def check_free(path: Path, *, force: bool) -> None:
    """Raise RequestError unless a file of that name may be written."""
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} is not a folder")
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise RequestError(f"{path} is not a regular file")
    if path.exists() and not force:
        raise RequestError(f"{path} exists already; --force replaces it")
