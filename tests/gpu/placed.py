"""Models whose experts are in slots of a wrapped CPU device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engine.decoding import Model
from engine.managed import Managed, bytes_for

from pyengine.native import NativeEngine


@contextlib.contextmanager
def placed(path: Path, share: float, ram_share: float = 1.0, host_threads: int = 0) -> Iterator[Managed]:
    """Load a model with slots in "VRAM" for a share of its experts, and RAM for another; 0 is the least that works, of
    RAM none. host_threads: that compute experts which are missing in VRAM, beside the "GPU"."""
    engine = NativeEngine(path)
    try:
        engine.use_gpu("CPU")
        engine.start_on_gpu(bytes_for(engine, share), int(ram_share * engine.info.slot_bytes))
        engine.set_host_threads(host_threads)
        with Model(path, engine, device=engine.gpu_device, plain=True) as model:
            yield Managed(engine, model)
    finally:
        engine.close()
