"""Costs with round numbers, and models that consist of nothing but their numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.native import ModelInfo
from pyengine.planner.costs import Costs
from pyengine.planner.demand import StepDemand
from pyengine.planning.shape import ModelShape, ShapeClass

MS = 1e-3

#: A layer's attention takes 1 ms + 0.1 ms per token, an expert 1 ms for one row and 0.1 ms for each further one.
COSTS = Costs(
    layer=((1, 1.1 * MS), (101, 11.1 * MS)),
    router_token_s=0.01 * MS,
    cell_s=0.0,
    output_s=0.0,
    host_s=0.0,
    expert=((1, 1.0 * MS), (101, 11.0 * MS)),
    pass_s=0.0,
    miss=((1, 0.0),),
    rest=((1, 0.0),),
    transfer_s=2.0 * MS,
    latency_s=1.0 * MS,
    transfer_bytes=1e6,
    recall=0.0,
    miss_factor=1.0,
    kv_bytes_per_token=1000,
    buffer_bytes=10_000_000,
    n_threads=2,
    bundle=True,
    measured=True,
)


def costs(**changed: Any) -> Costs:
    return replace(COSTS, **changed)


def demand(hot: float, hot_rows: float, cold: float, cold_rows: float, n_layer: int = 10) -> StepDemand:
    """The same in every layer."""
    return StepDemand(*(np.array([value]) for value in (hot, hot_rows, cold, cold_rows)), n_layer=n_layer)


def shape(n_layer: int = 4, n_expert: int = 8, n_used: int = 2, slot_bytes: int = 1_000_000) -> ModelShape:
    """All experts of one shape, 1 MB each; 20 MB of other weights."""
    total = n_layer * n_expert
    info = ModelInfo(
        architecture="llama",
        kernels="",
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_used,
        n_embd=64,
        n_class=1,
        n_file=1,
        direct_io=True,
        bundle=True,
        bundle_repacked=True,
        n_experts_total=total,
        file_bytes=total * slot_bytes + 20_000_000,
        expert_bytes=total * slot_bytes,
        slot_bytes=total * slot_bytes,
        least_budget=slot_bytes,
        expert_used_bytes=n_layer * n_used * slot_bytes,
    )
    one_class = ShapeClass(tuple(range(n_layer)), n_expert, slot_bytes, 3)
    return ModelShape(Path("made-up.gguf"), info, (one_class,), 1000, 4096)
