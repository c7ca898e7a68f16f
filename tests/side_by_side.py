"""Tests in several processes at once (`pytest -n 2 --dist loadfile`), some of which must be alone on the machine.

Owns who waits for whom. Without pytest-xdist's workers one test runs after another anyway, and nothing waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

_FOLDER = "pyengine_locks"
_LOCKS = pytest.StashKey["Locks"]()
_MADE = pytest.StashKey[Path]()


class Locks:
    """Two files that the workers of a run lock: tests share the room, and one that is marked `alone` has it to itself.

    Whoever wants to go in passes the door. It is held while waiting for the room to be empty: else the tests of other
    workers would go in one after another, and it would never be.
    """

    def __init__(self, folder: Path) -> None:
        self._door, self._room = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("door", "room"))

    def close(self) -> None:
        os.close(self._door)
        os.close(self._room)

    @contextlib.contextmanager
    def inside(self, *, alone: bool) -> Iterator[None]:
        """In the room, with others or without."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the process that starts the workers: tell each where the locks are."""
    stash = node.config.stash
    if _MADE not in stash:
        stash[_MADE] = Path(tempfile.mkdtemp(prefix="pyengine-locks-"))
    node.workerinput[_FOLDER] = str(stash[_MADE])


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark; in a worker, open the locks."""
    config.addinivalue_line(
        "markers", "alone: no worker runs another test meanwhile; what it measures, or waits for, needs the machine"
    )
    if folder := getattr(config, "workerinput", {}).get(_FOLDER):
        for name in ("COLUMNS", "LINES"):  # of the terminal where the workers were started; tests have others
            os.environ.pop(name, None)
        config.stash[_LOCKS] = Locks(Path(folder))


def pytest_unconfigure(config: pytest.Config) -> None:
    if locks := config.stash.get(_LOCKS, None):
        locks.close()
    if folder := config.stash.get(_MADE, None):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around a test with its fixtures, and around the time it is given: waiting takes none of that."""
    locks = item.config.stash.get(_LOCKS, None)
    with locks.inside(alone=item.get_closest_marker("alone") is not None) if locks else contextlib.nullcontext():
        return (yield)
