"""Ctrl-C: stops an answer between two tokens or inside a long computation, and ends a program that is still loading.

Python runs a signal's handler only when the interpreter gets control back, and one call into llama.cpp can keep it for
minutes. So an answer in progress is stopped through llama.cpp's abort callback, and loading, where nothing is worth
keeping, through a thread that the signal wakes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

# The abort callback costs about a microsecond per graph node, so it is set only while a step takes longer than this.
_SLOW_STEP_S = 0.25


class StopRequest:
    """Inside the `with` block Ctrl-C does not raise: it sets `requested` and aborts the computation in progress.

    Call tick() after every token. After an abort llama_cpp.Llama raises RuntimeError; expected() tells that one from
    a real failure.
    """

    def __init__(self, llm: Any) -> None:
        self.requested = False
        self._waiting = False
        self._llm = llm
        self._abort: Any = None
        self._last_tick = 0.0
        self._previous: Any = signal.getsignal(signal.SIGINT)
        self._log = logging.getLogger("llama-cpp-python")
        self._log_level = self._log.level

    def __enter__(self) -> StopRequest:
        if self._previous is not signal.SIG_IGN:  # a shell's background job, which Ctrl-C must not reach
            signal.signal(signal.SIGINT, self._on_signal)
        self._watch(True)  # the first step is the whole prompt
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._watch(False)
        signal.signal(signal.SIGINT, self._previous)
        self._log.setLevel(self._log_level)

    def tick(self) -> None:
        """Note that a token has come; the abort callback stays only while tokens are slow."""
        now = time.monotonic()
        slow = self._last_tick > 0.0 and now - self._last_tick > _SLOW_STEP_S
        self._last_tick = now
        if slow != (self._abort is not None):
            self._watch(slow)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block, which may wait for input without end, Ctrl-C does raise KeyboardInterrupt; so does one that
        has come before. `requested` is set all the same."""
        self._waiting = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def expected(self, error: Exception) -> bool:
        """Whether `error` is how the requested abort shows itself."""
        return self.requested and isinstance(error, RuntimeError)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.requested = True
        self._log.setLevel(logging.CRITICAL + 1)  # llama.cpp logs an abort as an error
        if self._waiting:
            raise KeyboardInterrupt  # or the read that was interrupted would begin again

    def _watch(self, wanted: bool) -> None:
        context = getattr(self._llm, "ctx", None)
        if context is None:
            return
        import llama_cpp

        # The callback object must outlive its use, and llama.cpp wants a null pointer of the same type to forget it.
        callback = llama_cpp.ggml_abort_callback(lambda _: self.requested) if wanted else None
        llama_cpp.llama_set_abort_callback(context, callback or llama_cpp.ggml_abort_callback(), None)
        self._abort = callback


@contextlib.contextmanager
def exit_on_interrupt(before_exit: Callable[[], None]) -> Iterator[None]:
    """Inside the block Ctrl-C ends the process with exit code 130 at once, even inside a long native call.

    `before_exit` runs first, on another thread; it restores the terminal. Only for work that leaves nothing behind.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as set_wakeup_fd demands
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                before_exit()
                os._exit(130)

    watcher = threading.Thread(target=wait, name="pyengine-interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread's read
        watcher.join()
        os.close(reader)
