"""The answers file: appended to line by line, safe against a crash at any moment, owned by one process.

An answer is written with one call and never changed. What a crash can leave behind is therefore a last line without an
end; it is cut off by the next run, and its line is answered anew. Nothing is cut before there is an answer to write: a
run that turns out to be impossible leaves the file as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pyengine.batch.lines import KEY_PREFIX, split_key
from pyengine.errors import UsageError
from pyengine.locked_file import open_locked
from pyengine.whole_file import behind_links, sync_folder, written_whole

#: The longest time for which finished answers may be lost to a power failure. (A killed process loses none.)
SYNC_S = 1.0

_BEGINNING = b'{"id": "' + KEY_PREFIX.encode()


class AnswersError(UsageError):
    """An answers file that is somebody else's: of other prompts, of another program, or in use."""


@dataclass
class Answered:
    """What an answers file holds already that is kept, by number of the input's line."""

    digests: dict[int, str] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    models: set[str] = field(default_factory=set)


class AnswersFile:
    """An answers file that is open for appending; nobody else can open it so meanwhile.

    Attributes:
        answered: what it held when it was opened, without what is to be forgotten.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, retry_failed: bool = False) -> None:
        """
        Args:
            overwrite: forget what the file holds.
            retry_failed: forget its error lines.

        Raises:
            AnswersError: it is in use, or not an answers file.
            OSError: it cannot be opened, read or written.
        """
        path = self._path = behind_links(path)
        self._made = not path.exists()
        self._descriptor = _locked(path)
        self._synced_at = time.monotonic()
        self._pending = False
        self._begun = False
        self._forgotten: set[int] = set()
        try:
            self.answered, self._kept = (Answered(), 0) if overwrite else _read(path, self._descriptor)
            if retry_failed:
                self._forgotten, self.answered.failed = self.answered.failed, set()
                for line in self._forgotten:
                    del self.answered.digests[line]
            if self._made:
                sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Cut off what is to be forgotten, and a torn line. add() does it, too; beginning again does nothing."""
        if self._begun:
            return
        os.ftruncate(self._descriptor, self._kept)
        if self._forgotten:
            self._drop_forgotten()
        self._begun = True

    def add(self, answer: dict[str, Any]) -> None:
        """Append one answer. Raises OSError if it cannot be written; what was there before stays whole."""
        self.begin()
        data = json_line(answer)
        length = os.fstat(self._descriptor).st_size
        rest = memoryview(data)
        try:
            while rest:  # a full disk takes a part, and fails then
                rest = rest[os.write(self._descriptor, rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, length)
            raise
        self._pending = True
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Let the disk have what was added more than SYNC_S ago. To be called now and then."""
        if self._pending and time.monotonic() - self._synced_at >= SYNC_S:
            self._sync()

    def close(self) -> None:
        """Let the disk have everything. Closing again does nothing."""
        if self._descriptor < 0:
            return
        try:
            if self._pending:
                self._sync()
            if self._made and os.fstat(self._descriptor).st_size == 0:
                self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)  # and with it the lock
            self._descriptor = -1

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._pending = False
        self._synced_at = time.monotonic()

    def _drop_forgotten(self) -> None:
        """Put a file without these lines in the place of this one; readers of the old one are not disturbed."""
        with written_whole(self._path) as file, open(self._path, "rb") as old:
            for data in old:
                place = split_key(json.loads(data)["id"])
                if place is not None and place[0] not in self._forgotten:
                    file.write(data)
        os.close(self._descriptor)
        self._descriptor = -1
        self._descriptor = _locked(self._path)


class AnswersStream:
    """Standard output, a pipe or a device in the place of a file: nothing to continue, nobody to keep out."""

    def __init__(self, file: BinaryIO) -> None:
        self.answered = Answered()
        self._file = file

    def begin(self) -> None:
        """Nothing was there."""

    def add(self, answer: dict[str, Any]) -> None:
        """Write one answer. Raises OSError, also when the reader went away."""
        self._file.write(json_line(answer))
        self._file.flush()

    def sync_if_due(self) -> None:
        """Nothing is kept back."""


@contextlib.contextmanager
def open_answers(
    target: Path | BinaryIO, *, overwrite: bool = False, retry_failed: bool = False
) -> Iterator[AnswersFile | AnswersStream]:
    """The answers file, or a stream where `target` is one: a file object, or the path of a pipe or a device."""
    if not isinstance(target, Path):
        yield AnswersStream(target)
    elif target.exists() and not target.is_file() and not target.is_dir():
        with target.open("wb") as file:
            yield AnswersStream(file)
    else:
        with AnswersFile(target, overwrite=overwrite, retry_failed=retry_failed) as answers:
            yield answers


def json_line(answer: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8, with its end."""
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def _locked(path: Path) -> int:
    """A descriptor of the file, made if absent, that no other process can get too."""
    try:
        descriptor = open_locked(path, lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666))
    except BlockingIOError:
        raise AnswersError(f"{path} is in use: another batch is writing to it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AnswersError(f"{path} is not a regular file")
    return descriptor


def _read(path: Path, descriptor: int) -> tuple[Answered, int]:
    """What the file holds, and the length of its whole lines in bytes."""
    answered, length = Answered(), 0
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        if not _ours(file.read(len(_BEGINNING))):  # it may be huge, and without a line end
            raise _foreign(path, 1)
        file.seek(0)
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                if not _ours(data[: len(_BEGINNING)]):
                    raise _foreign(path, number)
                break
            _note(answered, data, path, number)
            length += len(data)
    return answered, length


def _ours(beginning: bytes) -> bool:
    """Whether a line may begin so: whole, torn, or as zeros, which a power failure may leave of it."""
    return _BEGINNING.startswith(beginning) or not beginning.strip(b"\0")


def _note(answered: Answered, data: bytes, path: Path, number: int) -> None:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise _foreign(path, number) from None
    place = split_key(answer.get("id")) if isinstance(answer, dict) else None
    if place is None or "error" not in answer:
        raise _foreign(path, number)
    line, digest = place
    if line in answered.digests:
        raise AnswersError(f"{path}: line {number} answers a prompt that was answered before; --overwrite begins anew")
    answered.digests[line] = digest
    if answer["error"] is not None:
        answered.failed.add(line)
        return
    response = answer.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        answered.models.add(body["model"])


def _foreign(path: Path, number: int) -> AnswersError:
    return AnswersError(
        f"{path}: line {number} was not written by pyengine batch; name another file, or --overwrite this one"
    )
