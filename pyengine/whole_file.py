"""Files that appear whole or not at all.

One that takes another's place stands for it: symbolic links go on leading to it, and it has the other's mode and, as
far as the system allows, its owner and group. Where it does not allow that (only root may give files away), the file is
ours afterwards, and the mode speaks of us and our group. Not kept are hard links, whose other names keep the old
content, access control lists and extended attributes. The folder that must be writable is the file's, not the link's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BUFFER = 1 << 20  # gathers small writes; larger ones go past it


@contextlib.contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write; it takes the place of one of that name when the block ends without an error. Its folder is made
    if need be, and no error and no Ctrl-C leaves anything behind.

    Args:
        durable: wait until the disk has it. False: should the machine fail now, the file may be torn; for what readers
            check, and what can be made again.

    Raises:
        OSError: it cannot be written, or the name is that of something else than a file; what was there is as it was.
    """
    path = behind_links(path)
    mode = 0o666 if (old := _replaceable(path)) is None else stat.S_IMODE(old.st_mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # From the first moment on no more people may read it than the one it replaces.
        with open(part, "wb", _BUFFER, opener=lambda name, flags: os.open(name, flags, mode)) as file:
            stand_for(path, file.fileno())
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def behind_links(path: Path) -> Path:
    """The file that a symbolic link leads to, there or not yet; of another, `path` itself. Raises OSError if links lead
    in a circle."""
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


def stand_for(path: Path, descriptor: int) -> None:
    """Give an open file the mode of the one at `path`, if there is one, and as far as possible owner and group. Raises
    OSError if it cannot have the mode."""
    old, new = _replaceable(path), os.fstat(descriptor)
    if old is None:
        return
    for owner in ((-1, old.st_gid), (old.st_uid, -1)):  # giving the file to somebody may end the right to the other
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with contextlib.suppress(OSError):
                os.fchown(descriptor, *owner)
    if stat.S_IMODE(old.st_mode) != stat.S_IMODE(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def sync_folder(folder: Path) -> None:
    """Make sure, where a file system can, that a new name in the folder survives a power failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise OSError if written_whole() could not make this file now; its folder is made if need be."""
    path = behind_links(path)
    _replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _replaceable(path: Path) -> os.stat_result | None:
    """What the system says of the file; None: there is none. Raises OSError if it is something else than a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found
