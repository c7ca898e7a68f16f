"""Beginnings of the rows that the dense model writes, and their file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHAT, PLAIN_TEXT = 0, 1
USER, ASSISTANT = 0, 1
FREE = -1
"""in a prefix: sample this token"""


@dataclass(frozen=True)
class Prompts:
    """Beginnings of n rows."""

    prefix: NDArray[np.int32]
    """token ids, shape [n, prefix_length], padded with FREE"""
    kind: NDArray[np.int8]
    """CHAT or PLAIN_TEXT, shape [n]"""
    role: NDArray[np.int8]
    """whose turn the prefix leaves open, USER or ASSISTANT, shape [n]; plain text counts as the assistant's"""
    temperature: NDArray[np.float32]
    """sampling temperature of the assistant's turns and of plain text, shape [n]"""

    def save(self, path: Path) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, prefix=self.prefix, kind=self.kind, role=self.role, temperature=self.temperature)

    @classmethod
    def load(cls, path: Path) -> Prompts:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["prefix"], arrays["kind"], arrays["role"], arrays["temperature"])
