"""Runs a function in a process of its own and says how that ended: a crash there is a finding, not the end of pytest.

Processes are forked from one that has imported pyengine and done nothing else, so that each costs milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 120.0  # far more than any case needs; a busy machine is slow
PROMPT = "the rain in an open field"


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    exit_code: negative for a signal, None if it had to be stopped. output: all it printed. result: what the function
    gave, None if it did not come back. litter: names of files it left in its own temporary and working folder.
    """

    exit_code: int | None
    output: str
    result: Any
    litter: tuple[str, ...]

    def __str__(self) -> str:
        return f"exit code {self.exit_code}, result {self.result!r}, litter {self.litter}, output:\n{self.output}"


@dataclass(frozen=True)
class Attempt:
    """What came of loading a model and computing with it.

    kinds: names of the exception's class and its base classes, empty if all went well. left: what was there afterwards
    and not before, threads and descriptors.
    """

    kinds: tuple[str, ...] = ()
    message: str = ""
    text: str = ""
    left: dict[str, list[str]] = field(default_factory=dict)


def in_process(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call function(*arguments) in a fresh process; function, arguments and result must be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyengine.llama", "pyengine.cli", "pytest"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # for cases that give up their rights
        process = context.Process(
            target=_child, args=(sender, _Descriptor(output.fileno()), folder, function, arguments)
        )
        process.start()
        sender.close()
        result = None
        with contextlib.suppress(EOFError):  # it died before it had an answer
            if receiver.poll(TIME_LIMIT_S):
                result = receiver.recv()
        receiver.close()
        process.join(TIME_LIMIT_S)
        exit_code = process.exitcode
        if process.is_alive():
            process.kill()
            process.join()
        output.seek(0)
        litter = tuple(sorted(path.name for path in Path(folder).iterdir()))
        return Outcome(exit_code, output.read().decode("utf-8", "replace"), result, litter)


class _Descriptor:
    """A descriptor that travels to the other process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.number),)


def _received(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


def _child(
    sender: Connection, output: _Descriptor, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    for standard in (1, 2):
        os.dup2(output.number, standard)
    os.close(output.number)
    os.chdir(folder)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an assertion's backtrace would start a debugger
    result = function(*arguments)
    sys.stdout.flush()
    sender.send(result)
    sender.close()


def options_for(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of Llama that keep a tiny model quick, and `options`."""
    return {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, **(options or {})}


def attempt(path: Path, options: dict[str, Any] | None = None) -> Attempt:
    """Load a model, let it write three tokens, close it. Runs inside the process."""
    from pyengine.llama import Llama

    before = _belongings()
    kinds: tuple[str, ...] = ()
    message = text = ""
    try:
        with contextlib.closing(Llama(path, **options_for(options))) as llm:
            text = llm.create_completion(PROMPT, max_tokens=3, temperature=0)["choices"][0]["text"]  # type: ignore[index]
    except Exception as error:
        kinds, message = tuple(kind.__name__ for kind in type(error).__mro__), str(error)
    llm = None  # type: ignore[assignment]
    gc.collect()
    after = _belongings()
    left = {what: sorted(after[what] - before[what]) for what in after if after[what] - before[what]}
    return Attempt(kinds, message, text, left)


def attempts(paths: list[Path], times: int) -> tuple[list[Attempt], int]:
    """The last of several rounds of attempts, and by how many bytes the process's address space grew after the first
    two rounds."""
    for _ in range(2):
        for path in paths:
            attempt(path)
    before = _address_space()
    for _ in range(times):
        last = [attempt(path) for path in paths]
    return last, _address_space() - before


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _belongings() -> dict[str, set[str]]:
    descriptors = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            descriptors.add(f"{entry.name}: {entry.readlink()}")
    return {"threads": {entry.name for entry in Path("/proc/self/task").iterdir()}, "descriptors": descriptors}
