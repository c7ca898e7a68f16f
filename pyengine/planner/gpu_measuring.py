"""Finding the costs of an open model whose experts are in slots of a GPU's memory.

Expert ids come from us in the place of the router's, so that what is missing is settled. First steps whose experts are
all there: by tokens, and with few and many experts for the same number of tokens, which tells a layer's experts from
all else. Then sets of experts take turns, more of them than there are slots: what the engine waited for few and for
many missing experts of a layer is the latency and the pace of moving one, and how often they were found in RAM tells
link and disk apart. The GPU's kernels are not timed one by one; what of a step was not waiting is taken as computing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pyengine.planner.costs import Costs, Points, rising
from pyengine.planner.fitting import pace
from pyengine.planner.measuring import OUTPUTS, PATIENCE_S, REPEATS, host_seconds, output_seconds
from pyengine.planner.spread_run import SpreadRun, SpreadStep
from pyengine.planning.disk import measure_disk
from pyengine.planning.probe import ProbeError
from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama
    from pyengine.engine import ExpertEngine

#: Tokens of the steps that are measured, as far as a step is expected to take no longer than the patience.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
#: As in gpu_stream.cpp: with so many (token, expert) pairs per expert of a layer, the next one's are moved unasked.
_PAIRS_FOR_ALL = 4
#: Steps until what they use lies in slots, and seconds until a model that fits as a whole does.
_SETTLING, _FILL_S = 3, 30.0
#: Of the missing experts; from here on what the engine waited is taken as the link's.
_FROM_RAM = 0.9
_DISK_S = 0.25


@dataclass(frozen=True)
class _Moved:
    """Steps in which everything that was wanted was missing: means of the faster half, and what all of them moved."""

    tokens: int
    step: SpreadStep
    width: int
    """experts of a layer"""
    bytes_each: float
    link_s_each: float
    from_ram: float
    """share, 0..1"""


class _LeastRecent(SpreadRun):
    """Of a model with any policy: it is told of these steps as of others, and must not choose who leaves."""

    def __init__(self, llm: Llama, shape: ModelShape) -> None:
        super().__init__(llm, shape)
        assert llm.engine is not None
        info = llm.engine.info
        self._equal = np.zeros((info.n_layer, info.n_expert), np.float32)

    def step(self, tokens: int, *, all_outputs: bool = False) -> SpreadStep:
        self._native.set_priorities(self._equal)
        return super().step(tokens, all_outputs=all_outputs)


def stream_tokens(n_expert: int, n_used: int) -> int:
    """Tokens of a step from which a layer's missing experts are moved before its router has spoken."""
    return math.ceil(_PAIRS_FOR_ALL * n_expert / n_used)


@contextmanager
def _all_moved(engine: ExpertEngine) -> Iterator[None]:
    """No expert is computed by the CPU: what a miss costs is what moving it costs. In use it is that or less."""
    engine.native.set_host_threads(0)
    try:
        yield
    finally:
        engine.native.set_host_threads(engine.host_threads)


def costs_on_gpu(llm: Llama, shape: ModelShape) -> Costs:
    """Compute some steps; the context is empty afterwards, and the slots hold what it pleases. Takes some seconds.

    Args:
        llm: with slots on a GPU; nobody else computes with it.
        shape: of its model, with slots of the size that they have there.

    Raises:
        ProbeError: what is needed for one token does not stay in the slots.
        OSError: the model's file cannot be read.
    """
    assert llm.engine is not None
    info, stats = shape.info, llm.expert_stats()
    n_layer, n_used = info.n_layer, info.n_expert_used
    everything = stats["slots"] >= info.n_experts_total
    with _replayed(llm, shape) as run, _all_moved(llm.engine):
        n_expert = min(c.n_expert for c in shape.classes)
        slots = shape.slots(int(stats["budget_bytes"]))
        room = min(n // len(c.layers) for n, c in zip(slots, shape.classes, strict=True))
        width = max(n_used, min(n_expert, room))
        if everything:
            _wait_until_filled(llm, run)
        there = _there(run, width, everything)
        each = _expert_s(run, there, width, n_layer, n_used)
        layer = _layer(there, each, width, n_layer, n_used)
        run.spread(width)
        output = output_seconds(run, max(n for n in there if n <= OUTPUTS))
        host = host_seconds(llm, run)
        moved = [] if everything else _missing(llm, run, room, n_expert, n_used, n_layer)
    here = int(stats["ram_slots"]) / info.n_experts_total
    disk_s = 0.0
    if here < 1:
        disk = measure_disk(shape.path, int(shape.expert_bytes / shape.classes[0].n_matrix), _DISK_S)
        disk_s = shape.expert_bytes / disk.bytes_per_s
    costs = Costs(
        layer=layer,
        router_token_s=0.0,
        cell_s=0.0,
        output_s=output,
        host_s=host,
        expert=((1, each), (2, each)),
        pass_s=0.0,
        miss=((1, 0.0), (2, 0.0)),
        rest=((1, 0.0),),
        transfer_s=_link_s_so_far(llm),
        latency_s=0.0,
        transfer_bytes=shape.expert_bytes,
        recall=0.0,
        miss_factor=1.0,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        buffer_bytes=0,
        n_threads=int(llm.n_threads),
        bundle=False,
        measured=True,
        device=str(stats["gpu"]),
        stream_tokens=stream_tokens(n_expert, n_used),
        disk_s=disk_s,
        ram_share=min(1.0, here),
    )
    return _with_moved(costs, moved, n_layer, n_used) if moved else costs


@contextmanager
def _replayed(llm: Llama, shape: ModelShape) -> Iterator[SpreadRun]:
    """Expert ids come from us; afterwards the router has its say again, and the policy with the next token."""
    assert llm.engine is not None
    native, info = llm.engine.native, shape.info
    try:
        yield _LeastRecent(llm, shape)
    finally:
        native.set_replay(np.empty((0, info.n_layer, info.n_expert_used), np.int32))
        llm.reset()  # type: ignore[no-untyped-call]
        llm._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]


def _wait_until_filled(llm: Llama, run: SpreadRun) -> None:
    end = time.perf_counter() + _FILL_S
    while llm.expert_stats()["resident"] < llm.expert_stats()["slots"] and time.perf_counter() < end:
        run.step(1)
        time.sleep(0.01)


def _there(run: SpreadRun, width: int, everything: bool) -> dict[int, SpreadStep]:
    """By tokens of a step, ascending: the fastest, in what was not waiting. Few tokens' experts are all there."""
    found: dict[int, SpreadStep] = {}
    most = min(TOKENS[-1], int(run.most_tokens))
    for n in TOKENS:
        if n > most or (found and max(step.wall / m for m, step in found.items()) * n > PATIENCE_S):
            break
        steps = _settled(run, n, width)
        # Where a whole layer is moved unasked, there always is something missing, unless there is room for everything.
        calm = steps if everything else [step for step in steps if not step.misses] or (steps if n > 1 else [])
        if calm:
            found[n] = min(calm, key=lambda step: step.working)
    if 1 not in found:
        raise ProbeError("so few experts stay in the GPU's memory that no step is without a missing one")
    return found


def _settled(run: SpreadRun, tokens: int, width: int) -> list[SpreadStep]:
    """Steps that use the same experts again and again."""
    run.spread(width)
    for _ in range(_SETTLING):
        run.step(tokens)
    return run.samples(tokens, REPEATS)


def _distinct(tokens: int, width: int, n_used: int) -> int:
    """Experts that a layer of such a step uses."""
    return min(width, tokens * n_used)


def _expert_s(run: SpreadRun, there: dict[int, SpreadStep], width: int, n_layer: int, n_used: int) -> float:
    """What one more expert of a layer takes, if others have fewer rows for it."""
    found = []
    for n, step in there.items():
        more = (_distinct(n, width, n_used) - n_used) * (n_layer - 1)  # one token is all that comes to the last layer
        if more > 0 and not step.misses:
            narrow = [one for one in _settled(run, n, n_used) if not one.misses]
            if narrow:
                found.append((step.working - min(one.working for one in narrow)) / more)
    return max(1e-9, statistics.median(found)) if found else 1e-9


def _layer(there: dict[int, SpreadStep], each: float, width: int, n_layer: int, n_used: int) -> Points:
    def others(n: int, step: SpreadStep) -> float:
        experts = each * (_distinct(n, width, n_used) * (n_layer - 1) + n_used)
        return max(1e-9, (step.working - experts) / n_layer)

    return rising(tuple((n, others(n, step)) for n, step in there.items()))


def _missing(llm: Llama, run: SpreadRun, room: int, n_expert: int, n_used: int, n_layer: int) -> list[_Moved]:
    """Few and many missing experts in a layer; empty if none can be missing."""
    most = min(n_expert, max(2 * n_used, room), stream_tokens(n_expert, n_used) * n_used // 2)
    found = []
    for width in sorted({n_used, most}):
        tokens = max(2, width // n_used)
        moved = _moving(llm, run, tokens, width, n_expert)
        if moved is not None:
            found.append(moved)
    return found


def _moving(llm: Llama, run: SpreadRun, tokens: int, width: int, n_expert: int) -> _Moved | None:
    first, steps = 0, []
    run.samples(tokens, 1)
    for number in range(2 * REPEATS + n_expert // width):
        first = (first + width) % n_expert
        run.spread(width, first)
        if number == n_expert // width:  # all have been here once, and in RAM
            before = llm.expert_stats()
        step = run.step(tokens)
        if number >= n_expert // width:
            steps.append(step)
    after = llm.expert_stats()
    misses = sum(step.misses for step in steps)
    if misses == 0:
        return None

    def of(name: str) -> float:
        return float(after[name] - before[name])

    half = sorted(steps, key=lambda step: step.wall)[: REPEATS + 1]
    mean = SpreadStep(
        wall=statistics.mean(step.wall for step in half),
        kernels=0.0,
        stall=statistics.mean(step.stall for step in half),
        io=statistics.mean(step.io for step in half),
        misses=max(1, round(statistics.mean(step.misses for step in half))),
    )
    return _Moved(
        tokens, mean, width, of("link_bytes") / misses, of("link_seconds") / misses, min(1.0, of("ram_hits") / misses)
    )


def _with_moved(costs: Costs, moved: list[_Moved], n_layer: int, n_used: int) -> Costs:
    """With what steps showed whose experts were missing, few and many, or only as many."""
    few, many = moved[0], moved[-1]
    if few.step.misses < many.step.misses:
        each, latency = pace(few.step.stall, few.step.misses, many.step.stall, many.step.misses, n_layer)
    else:
        each, latency = many.step.stall / many.step.misses, 0.0
    experts = float(costs.expert_s(1.0)) * (many.width * (n_layer - 1) + n_used)
    there = n_layer * costs.layer_s(many.tokens) + experts
    beside = max(0.0, many.step.working - there) / many.step.misses
    found = replace(costs, transfer_s=each, latency_s=latency, transfer_bytes=max(1.0, many.bytes_each))
    found = replace(found, miss=((1, beside), (2, beside)))
    if many.from_ram < _FROM_RAM:  # the disk was waited for, too
        link = min(each, many.link_s_each)
        found = replace(found, transfer_s=link, disk_s=max(found.disk_s, each / (1 - many.from_ram)))
    return found


def _link_s_so_far(llm: Llama) -> float:
    """Per expert, of all that was moved since loading."""
    stats = llm.expert_stats()
    if not stats["link_bytes"]:
        return 0.0
    each = stats["expert_bytes"] / stats["experts"]
    return float(stats["link_seconds"] * each / stats["link_bytes"])
