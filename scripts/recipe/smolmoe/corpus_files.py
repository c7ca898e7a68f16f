"""Names of the files in a corpus's folder; each is a 1-D uint16 array of token ids."""

from __future__ import annotations

TRAINING_STREAM = "real_train.npy"


def held_out_file(name: str) -> str:
    """The file of an evaluation set."""
    return f"held_{name}.npy"
