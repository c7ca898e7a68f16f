"""The file of a saved prefix: its tokens, what they belong to, and llama.cpp's state of the sequence.

8 bytes  b"PYEPREFX"
u32 LE   version
u32 LE   length of the next
JSON     {"fingerprint": {name: value}, "n_tokens": n}
i32 LE   token ids, n_tokens of them
bytes    llama_state_seq_get_data
16 bytes BLAKE2b of everything before
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyengine.errors import PyengineError
from pyengine.whole_file import written_whole

VERSION = 1
_MAGIC, _HEAD, _DIGEST = b"PYEPREFX", struct.Struct("<8sII"), 16


class PrefixFileError(PyengineError):
    """A saved prefix that cannot be used: unreadable, damaged, or of another model."""


class SavedPrefix(NamedTuple):
    tokens: tuple[int, ...]
    state: memoryview | bytes


def write_prefix(path: Path, prefix: SavedPrefix, belongs_to: dict[str, str | float]) -> None:
    """Raises PrefixFileError; then the file that was there is as it was."""
    meta = json.dumps({"fingerprint": belongs_to, "n_tokens": len(prefix.tokens)}).encode()
    parts = (
        _HEAD.pack(_MAGIC, VERSION, len(meta)),
        meta,
        np.asarray(prefix.tokens, "<i4").tobytes(),
        prefix.state,
    )
    digest = hashlib.blake2b(digest_size=_DIGEST)
    try:
        with written_whole(path) as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise PrefixFileError(f"{path}: the prefix cannot be saved: {error.strerror or error}") from error


def read_prefix(path: Path, belongs_to: dict[str, str | float]) -> SavedPrefix:
    """Raises PrefixFileError."""
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise PrefixFileError(f"{path}: the prefix cannot be read: {error.strerror or error}") from error
    if len(content) < _HEAD.size + _DIGEST or content[: len(_MAGIC)] != _MAGIC:
        raise PrefixFileError(f"{path}: not a saved prefix")
    _, version, n_meta = _HEAD.unpack_from(content)
    if version != VERSION:
        raise PrefixFileError(f"{path}: a saved prefix of version {version}; this program reads version {VERSION}")
    body = content[:-_DIGEST]
    if hashlib.blake2b(body, digest_size=_DIGEST).digest() != content[-_DIGEST:]:
        raise PrefixFileError(f"{path}: the saved prefix is damaged; delete it, it can be made again")
    try:
        meta = json.loads(bytes(body[_HEAD.size : _HEAD.size + n_meta]))
        theirs, n_tokens = dict(meta["fingerprint"]), int(meta["n_tokens"])
        begin = _HEAD.size + n_meta
        tokens = tuple(np.frombuffer(body, "<i4", n_tokens, begin).tolist())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PrefixFileError(f"{path}: the saved prefix says what it cannot be") from error
    if theirs != belongs_to:
        raise PrefixFileError(f"{path}: {_difference(theirs, belongs_to)}")
    return SavedPrefix(tokens, body[begin + 4 * n_tokens :])


def _difference(theirs: dict[str, str | float], ours: dict[str, str | float]) -> str:
    if theirs.get("model") != ours["model"]:
        return "saved with another model"
    name = next(name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name))
    return f"saved with other settings: {name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
