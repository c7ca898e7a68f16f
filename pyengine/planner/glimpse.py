"""Costs at a glance: a few steps of a model that is open anyway, for who cannot wait for a measurement, or has no
memory to load the model a second time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.planner.costs import Costs, rising
from pyengine.planning.disk import measure_disk
from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama

#: Tokens of the steps, in order. The large one is first, since it lets experts in, and once more, since a first step
#: also finds memory; the faster counts.
_SMALL, _LARGE = 1, 32
_STEPS = (_LARGE, _LARGE, _SMALL, _SMALL, _SMALL)
_DISK_S = 0.25


def glimpsed_costs(llm: Llama, shape: ModelShape) -> Costs:
    """Compute some tokens and read some experts; the context is empty afterwards. Takes about as long as two prompts
    of so many tokens. Raises OSError."""
    kernels: dict[int, tuple[int, float]] = {}
    layer: dict[int, float] = {}
    token = max(0, llm.token_bos())
    reads_s: list[float] = []
    for n in _STEPS:
        n = min(n, int(llm.n_ctx()) - 1)
        llm.reset()  # type: ignore[no-untyped-call]
        before = llm.expert_stats()
        started = time.perf_counter()
        llm.eval([token + i % 16 for i in range(n)])
        wall = time.perf_counter() - started
        after = llm.expert_stats()

        def of(name: str, before: dict[str, float] = before, after: dict[str, float] = after) -> float:
            return float(after[name] - before[name])

        used = max(1.0, of("hits") + of("misses"))
        rows = max(1, round(n * shape.info.n_expert_used * shape.info.n_layer / used))
        one = max(1e-9, of("compute_seconds") / used)
        kernels[n] = (rows, min(one, kernels.get(n, (0, one))[1]))
        other = max(1e-9, (wall - of("compute_seconds") - of("stall_seconds")) / shape.info.n_layer)
        layer[n] = min(other, layer.get(n, other))
        # A token's few missing experts are under way alone; and the pace is wanted at which many come.
        if n > _SMALL and of("misses") >= shape.info.n_layer:
            reads_s.append(of("io_seconds") / of("misses"))
    llm.reset()  # type: ignore[no-untyped-call]
    bundle = llm.expert_stats()["bundle"]
    n_reads = 1 if bundle else shape.classes[0].n_matrix
    disk = measure_disk(Path(bundle) if bundle else shape.path, int(shape.expert_bytes / n_reads), _DISK_S)
    # What the engine took for its reads knows of repacking, too; but few of them say little.
    read_s = min(reads_s, default=shape.expert_bytes / disk.bytes_per_s)
    return Costs(
        layer=rising(tuple(sorted(layer.items()))),
        router_token_s=0.0,
        cell_s=0.0,
        output_s=0.0,
        host_s=0.0,
        expert=rising(tuple(sorted(dict(kernels.values()).items()))),
        pass_s=0.0,
        miss=((1, 0.0),),
        rest=((1, 0.0),),
        transfer_s=read_s,
        latency_s=disk.latency_s,
        transfer_bytes=shape.expert_bytes,
        recall=0.0,
        miss_factor=1.0,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        buffer_bytes=0,
        n_threads=int(llm.n_threads),
        bundle=bool(bundle),
        measured=False,
    )
