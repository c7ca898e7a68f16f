"""Prompts from the command line, files and pipes, always as valid UTF-8."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

# How long a pipe may stay silent before an optional prompt is taken as not given. Some programs start others with a
# standard input that is open for ever and never written to.
PIPE_PATIENCE_S = 10.0


def from_option(text: str, option: str) -> str:
    """`text` as given on the command line.

    Raises:
        ValueError: the argument was not valid UTF-8.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        # Python could not read the argument in this locale's encoding; perhaps its bytes are UTF-8 all the same.
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"the text given with {option} is not valid UTF-8") from None


def from_file(name: str) -> str:
    """The text of a file, or of standard input for "-", without its last newline (as in llama.cpp).

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid UTF-8.
    """
    if name == "-":
        return _decoded(sys.stdin.buffer.read() if sys.stdin else b"", "standard input")
    return _decoded(Path(name).read_bytes(), name)


def from_pipe() -> str | None:
    """What another program pipes to us; None when standard input is a terminal, closed, empty or silent.

    Raises:
        ValueError: it is not valid UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    if not _speaks():
        return None
    return from_file("-").strip() or None


def _speaks() -> bool:
    """Whether standard input has data or has ended, within PIPE_PATIENCE_S."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):
        return True  # not a real file: reading cannot block
    try:
        ready, _, _ = select.select([descriptor], [], [], PIPE_PATIENCE_S)
    except (OSError, ValueError):
        return True  # a platform that selects on sockets only
    return bool(ready)


def _decoded(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not valid UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})"
        ) from None
    return text.removesuffix("\n")
