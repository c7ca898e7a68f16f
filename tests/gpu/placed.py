"""Models whose experts are in slots of a wrapped CPU device, or of several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.decoding import Model
from engine.managed import Managed, bytes_for

from pyengine.native import NativeEngine


@contextlib.contextmanager
def placed(
    path: Path,
    share: float,
    ram_share: float = 1.0,
    split: Sequence[float] = (1.0,),
    host_threads: int = 0,
    bundle: Path | None = None,
    experts_used: int | None = None,
) -> Iterator[Managed]:
    """Load a model with slots in "VRAM" for a share of its experts, and RAM for another; 0 is the least that works, of
    RAM none. split: of the layers, one for each "GPU". host_threads: that compute experts which are missing in VRAM.
    experts_used: by a token, if not as the file says."""
    engine = NativeEngine(path)
    try:
        if bundle is not None:
            engine.use_bundle(bundle)
        metadata = None
        if experts_used is not None:
            engine.use_experts(experts_used)
            metadata = {f"{engine.info.architecture}.expert_used_count": experts_used}
        engine.use_gpus(["CPU"] * len(split), split)
        engine.start_on_gpu(bytes_for(engine, share), int(ram_share * engine.info.slot_bytes))
        engine.set_host_threads(host_threads)
        with Model(path, engine, devices=engine.gpu_devices, split=split, plain=True, metadata=metadata) as model:
            yield Managed(engine, model)
    finally:
        engine.close()
