"""The lines of a prompts file, one at a time, and the key that ties an answer to its line.

It knows bytes only; what a line asks for is `requests`' affair.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

#: A longer line is not kept in memory; it becomes an error line.
MOST_LINE_BYTES = 64 << 20

KEY_PREFIX = "batch_req_"

_KEY = re.compile(KEY_PREFIX + r"([0-9]{7,})_([0-9a-f]{16})")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line that is not blank. `number` counts all lines from 1, as editors do; `data` has no line end, and is None
    for a line of more than MOST_LINE_BYTES."""

    number: int
    data: bytes | None
    digest: str

    @property
    def key(self) -> str:
        """Names this line with this content, and serves as the answer's `id`."""
        return f"{KEY_PREFIX}{self.number:07}_{self.digest}"


def split_key(key: object) -> tuple[int, str] | None:
    """Line number and digest of a key that Line.key made; None for anything else."""
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    return (int(match[1]), match[2]) if match else None


def read_lines(file: BinaryIO, most_bytes: int = MOST_LINE_BYTES) -> Iterator[Line]:
    """The lines of `file` that are not blank. Only one of them is in memory, and of a too long one only a piece.

    Raises:
        OSError: the file cannot be read.
    """
    number = 0
    while piece := file.readline(most_bytes + 1):
        number += 1
        hashed = hashlib.blake2b(digest_size=8)
        if number == 1:
            piece = piece.removeprefix(_BYTE_ORDER_MARK)
        if len(piece) > most_bytes and not piece.endswith(b"\n"):
            while piece:
                hashed.update(piece)
                if piece.endswith(b"\n"):
                    break
                piece = file.readline(most_bytes + 1)
            yield Line(number, None, hashed.hexdigest())
            continue
        data = piece.strip(b" \t\r\n")
        if data:
            hashed.update(data)
            yield Line(number, data, hashed.hexdigest())
