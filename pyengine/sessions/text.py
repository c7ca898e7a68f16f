"""Text out of tokens as they come: whole characters only, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence

import llama_cpp


def token_bytes(vocab: llama_cpp.llama_vocab_p, token: int) -> bytes:
    """UTF-8 of a token in the middle of a text, perhaps part of a character; nothing for a control token."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


class TextStream:
    """
    Args:
        stop: the text ends before the first of these.

    Attributes:
        stopped: one of them came.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # as llama_cpp.Llama
        self._held = ""
        self.stopped = False

    def add(self, piece: bytes) -> str:
        """What is sure now and was not before."""
        self._held += self._decoder.decode(piece)
        first = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if first >= 0:
            self.stopped = True
            sure, self._held = self._held[:first], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def end(self) -> str:
        """Nothing more comes: what was held back. Half a character is dropped."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that `stop` begins with, not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
