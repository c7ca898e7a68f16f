"""What llama.cpp says when it fails. It logs reasons and returns numbers; we turn the reasons into exceptions."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator

import llama_cpp
from llama_cpp import _logger

from pyengine.errors import one_line

# enum ggml_log_level. llama_cpp's own table of it is one off: it prints warnings even if not verbose, and hides errors.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5

# llama.cpp has one log callback per process, so this is process-wide too: with two threads inside errors_said() a line
# goes to the one that entered last.
_collecting: list[list[str]] = []
_last_level = 0


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    global _last_level
    if level != _CONTINUED:
        _last_level = level
    if _collecting and _last_level == _ERROR:
        _collecting[-1].append(one_line(text.decode("utf-8", "replace")))
    elif not _collecting or _last_level != _WARNING or _logger.logger.level <= logging.DEBUG:
        _logger.llama_log_callback(level, text, user_data)


@contextlib.contextmanager
def errors_said() -> Iterator[list[str]]:
    """Collect llama.cpp's error lines instead of printing them, and keep its warnings to those who asked for verbose;
    everything else goes where llama_cpp sends it."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    lines: list[str] = []
    _collecting.append(lines)
    try:
        yield lines
    finally:
        _collecting[:] = [other for other in _collecting if other is not lines]
