"""Trained weights on disk: an .npz with one float32 array per tensor, under its GGUF name and in the file's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save_tensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Write the tensors."""
    arrays: dict[str, Any] = dict(tensors)
    np.savez(path, **arrays)


def load_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read what `save_tensors` wrote, in the same order."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}
