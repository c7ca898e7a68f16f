"""Models whose experts are in our engine, and what to say when their logits are not stock's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyengine.native import NativeEngine

from .decoding import Logits, Model

#: pye_event.kind
HIT, MISS, EVICT = 0, 1, 2


class Managed(NamedTuple):
    """A loaded model and the engine that has its experts."""

    engine: NativeEngine
    model: Model


def bytes_for(engine: NativeEngine, share: float) -> int:
    """The budget that is this share of all experts, or the least one if that is more."""
    info = engine.info
    return max(info.least_budget, int(share * info.slot_bytes))


@contextlib.contextmanager
def managed(path: Path, share: float) -> Iterator[Managed]:
    """Load a model with slots for a share of its experts; 0 is the least budget that works."""
    engine = NativeEngine(path)
    try:
        engine.start(bytes_for(engine, share))
        with Model(path, engine) as model:
            yield Managed(engine, model)
    finally:
        engine.close()


def nmse(got: Logits, wanted: Logits) -> float:
    """Mean square of the error over mean square of what is wanted."""
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def same_bits(got: Logits, wanted: Logits) -> bool:
    """Whether two arrays of logits have the same bits."""
    return got.shape == wanted.shape and bool(np.array_equal(got.view(np.uint32), wanted.view(np.uint32)))


def assert_same_bits(got: Logits, wanted: Logits) -> None:
    """Logits [n_tokens, n_vocab]: fail with what differs, and by how much."""
    assert got.shape == wanted.shape
    wrong = np.flatnonzero((got.view(np.uint32) != wanted.view(np.uint32)).any(axis=1))
    assert not wrong.size, (
        f"{wrong.size} of {len(got)} tokens have other logits, the first is {wrong[0]}; "
        f"largest difference {np.abs(got - wanted).max():.3g}, NMSE {nmse(got, wanted):.2g}"
    )
