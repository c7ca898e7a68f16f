"""Runs a function in a process of its own and says how that ended: a crash there is a finding, not the end of pytest.

Processes are forked from one that has imported pyengine and done nothing else, so that each costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 60.0  # far more than any case needs; a busy machine is slow


@dataclass(frozen=True)
class Outcome:
    """How a process ended. exit_code: negative for a signal. output: all it printed. result: what the function gave,
    None if it did not come back."""

    exit_code: int | None
    output: str
    result: Any

    def __str__(self) -> str:
        return f"exit code {self.exit_code}, result {self.result!r}, output:\n{self.output}"


@dataclass(frozen=True)
class Attempt:
    """What came of loading a model and computing with it.

    error: name of the exception's class, None if all went well. kinds: names of its base classes too. left: what was
    there afterwards and not before: threads, descriptors, files.
    """

    error: str | None
    kinds: tuple[str, ...] = ()
    message: str = ""
    text: str = ""
    left: dict[str, list[str]] = field(default_factory=dict)


def in_process(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call function(*arguments) in a fresh process; function and arguments must be importable and picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyengine.llama", "pytest"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as output:
        process = context.Process(target=_child, args=(sender, _Descriptor(output.fileno()), function, arguments))
        process.start()
        sender.close()
        process.join(TIME_LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
            exit_code = None
        else:
            exit_code = process.exitcode
        result = None
        try:
            if receiver.poll():
                result = receiver.recv()
        except EOFError:
            pass
        finally:
            receiver.close()
        output.seek(0)
        return Outcome(exit_code, output.read().decode("utf-8", "replace"), result)


class _Descriptor:
    """A descriptor that travels to the other process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self.number),)


def _received(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


def _child(sender: Any, output: _Descriptor, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for standard in (1, 2):
        os.dup2(output.number, standard)
    os.close(output.number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an assertion's backtrace would start a debugger
    sender.send(function(*arguments))
    sender.close()
    sys.stdout.flush()


def attempt(path: Path, options: dict[str, Any] | None = None) -> Attempt:
    """Load a model, let it write three tokens, close it. Runs inside the process."""
    import gc

    from pyengine.llama import Llama

    before = _belongings()
    error, text = None, ""
    try:
        llm = Llama(path, **{"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, **(options or {})})
        try:
            text = llm.create_completion("the rain", max_tokens=3, temperature=0)["choices"][0]["text"]  # type: ignore[index]
        finally:
            llm.close()
        del llm
    except Exception as caught:
        error = caught
    kinds = tuple(kind.__name__ for kind in type(error).__mro__) if error else ()
    name, message = (type(error).__name__, str(error)) if error else (None, "")
    del error
    gc.collect()
    after = _belongings()
    left = {what: sorted(after[what] - before[what]) for what in after if after[what] - before[what]}
    return Attempt(name, kinds, message, text, left)


def _belongings() -> dict[str, set[str]]:
    descriptors = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{entry}: {os.readlink(f'/proc/self/fd/{entry}')}")
        except OSError:
            pass  # the descriptor of this very listing
    return {
        "threads": set(os.listdir("/proc/self/task")),
        "descriptors": descriptors,
        "temporary files": set(os.listdir(tempfile.gettempdir())),
    }
