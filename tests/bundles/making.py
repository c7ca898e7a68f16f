"""Makes bundles of small models, and loads models that read from one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from engine.decoding import Model
from engine.managed import Managed, bytes_for

from gguf_tools.bundles.format import Tables
from gguf_tools.bundles.model import opened_model, prepare, tables_of
from gguf_tools.bundles.order import place
from gguf_tools.bundles.progress import no_progress
from gguf_tools.bundles.writer import Made, make_bundle
from pyengine.native import NativeEngine


def silent(_line: str) -> None:
    """Says nothing."""


def planned(model: Path, *, raw: bool = False, shuffled: int | None = None) -> Tables:
    """What a bundle of the model must say; `shuffled` is the seed of a random order within each layer."""
    prepare()
    with opened_model(model) as engine:
        tables = tables_of(engine, raw)
    if shuffled is not None:
        rng = np.random.default_rng(shuffled)
        place(tables, [rng.permutation(int(layer["n_expert"])).tolist() for layer in tables.layers[0]])
        tables.set_order(f"shuffled by {shuffled}")
    return tables


def make(model: Path, target: Path, *, raw: bool = False, shuffled: int | None = None, threads: int = 2) -> Made:
    """Make a bundle."""
    tables = planned(model, raw=raw, shuffled=shuffled)
    return make_bundle(model, target, tables, threads=threads, progress=no_progress, say=silent)


@contextlib.contextmanager
def opened(model: Path, bundle: Path | None, share: float = 0.0) -> Iterator[Managed]:
    """Load a model that reads its experts from a bundle, with slots for a share of them; 0 is the least budget."""
    engine = NativeEngine(model)
    try:
        if bundle is not None:
            engine.use_bundle(bundle)
        engine.start(bytes_for(engine, share))
        with Model(model, engine) as loaded:
            yield Managed(engine, loaded)
    finally:
        engine.close()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
