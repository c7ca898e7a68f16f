"""One thread at a time may use a Llama: a second one gets an error before it can mix up the first one's text."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from pyengine.errors import UsageError


class OneUser:
    """Who is computing now, and whose text is under way.

    A text may be continued by another thread (servers step a stream from a pool), but while it is under way no thread
    other than the last one that worked on it may start something else.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._process = os.getpid()
        self._thread: int | None = None  # computing now
        self._depth = 0  # a computation calls others
        self._text: object | None = None  # under way
        self._writer: int | None = None  # the thread that worked on it last

    @contextlib.contextmanager
    def computing(self, text: object | None = None) -> Iterator[None]:
        """Inside, this thread computes, on `text` if given. Raises UsageError if another thread does."""
        me = threading.get_ident()
        with self._changed:
            foreign_text = self._text is not None and self._text is not text and self._writer != me
            if self._thread not in (None, me) or (foreign_text and self._thread is None):
                raise UsageError("another thread is computing with this Llama; use one Llama per thread, or a lock")
            self._thread = me
            self._depth += 1
            if text is not None:
                self._text, self._writer = text, me
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if self._depth == 0:
                    self._thread = None
                    self._changed.notify_all()

    def finished(self, text: object) -> None:
        """The text is complete or given up."""
        with self._changed:
            if self._text is text:
                self._text = self._writer = None

    def wait_until_idle(self) -> None:
        """Until no other thread computes. In a forked child there is nobody to wait for."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._thread in (None, threading.get_ident()))
