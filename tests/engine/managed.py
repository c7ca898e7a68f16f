"""Models whose experts are in our engine, and what to say when their logits are not stock's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyengine.native import NativeEngine

from .decoding import Logits, Model, Script

#: Tokens of a step up to which rows meet matrices one by one, with the kernels that stock runs (kMostTokensByRow)
MOST_TOKENS_BY_ROW = 16

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


def alike(script: Script, n_ubatch: int = 512) -> int:
    """Tokens at the beginning of a script whose logits must have stock's bits: up to the first micro-batch that is long
    enough for its experts to be computed one by one, with kernels that may round otherwise than stock's."""
    n = 0
    for chunk in script:
        if min(len(chunk), n_ubatch) > MOST_TOKENS_BY_ROW:
            break
        n += len(chunk)
    return n


def assert_as_stock(got: Logits, wanted: Logits, script: Script, n_ubatch: int = 512) -> None:
    """Logits of a script: stock's bits up to its first long prompt, stock's values up to rounding from there on."""
    n = alike(script, n_ubatch)
    assert_same_bits(got[:n], wanted[:n])
    assert got.shape == wanted.shape
    assert n == len(got) or (error := nmse(got[n:], wanted[n:])) < 1e-6, f"NMSE {error:.2g}"
