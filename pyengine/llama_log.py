"""What llama.cpp says when it fails. It logs reasons and returns numbers; we turn the reasons into exceptions."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import llama_cpp
from llama_cpp import _logger

_ERROR = 3  # GGML_LOG_LEVEL_ERROR
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT

# llama.cpp has one log callback per process, so this is process-wide too: with two threads inside errors_said() a line
# goes to the one that entered last.
_collecting: list[list[str]] = []
_in_error = False


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    global _in_error
    if level != _CONTINUED:
        _in_error = level == _ERROR
    if _in_error and _collecting:
        _collecting[-1].append(text.decode("utf-8", "replace").strip())
    else:
        _logger.llama_log_callback(level, text, user_data)


@contextlib.contextmanager
def errors_said() -> Iterator[list[str]]:
    """Collect llama.cpp's error lines instead of printing them; everything else goes where llama_cpp sends it."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    lines: list[str] = []
    _collecting.append(lines)
    try:
        yield lines
    finally:
        _collecting[:] = [other for other in _collecting if other is not lines]
