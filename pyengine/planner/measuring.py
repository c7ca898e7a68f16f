"""Finding the costs of a model on this machine: the measurements of `pyengine plan` (pyengine.planning.probe), and a
second short run for what only several tokens at once show.

That run has two parts. With as many slots as there is memory and patience for, nothing is missing: kernels by rows to
an expert, and all else by tokens. Then the slots become few and everything is missing: what io_seconds the engine
counts for few and for many missing experts of a layer is their latency and pace, beside kernels at work, as in a batch;
and the time not waited for, compared with the same step of the first part, is what an expert costs by being missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyengine.budget import available_memory, reserve
from pyengine.planner.costs import Costs, Points, cells_looked_at, rising
from pyengine.planner.fitting import expert_points, pace, pass_seconds
from pyengine.planner.spread_run import SpreadRun, SpreadStep
from pyengine.planning.controlled_run import budget_of_one_token
from pyengine.planning.measured import Measured
from pyengine.planning.probe import ProbeError
from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama

#: Rows to an expert that are measured, as far as a step is expected to take no longer than the patience, seconds. Close
#: to each other where the engine begins to compute expert by expert.
ROWS = (1, 2, 3, 4, 5, 8, 16, 64)
PATIENCE_S = 2.0
#: Of what is missing. The engine's kernels then are those of many texts.
_MISSING_ROWS = 8
#: Steps of each kind. Where nothing is missing the fastest counts: other programs only ever make one slower. Of reading
#: the middle of the faster half does: a disk is often slower for a while, that is how it is.
REPEATS = 5
#: Tokens all of whose logits are wanted, to see what the head takes.
OUTPUTS = 16
#: KV cells, and sequences among which they are divided to see what attention takes of many.
_CONTEXT, _SEQUENCES = 1024, 16
MOST_TOKENS = 512


def measure_costs(
    shape: ModelShape,
    measured: Measured,
    say: Callable[[str], None] = lambda _: None,
    bundle: str | Path = "use",
) -> Costs:
    """Load the model and compute steps of many tokens, whose experts are all there, and then all missing. Takes some
    seconds; with large experts half a minute.

    Args:
        measured: what `pyengine plan` has measured.

    Raises:
        ProbeError: the model is not managed.
        PyengineError, OSError: it cannot be loaded or read.
    """
    from pyengine import Llama

    say("Loading")
    info = shape.info
    llm = Llama(
        shape.path,
        gpu="off",
        ram_budget=_room(shape, measured),
        bundle=bundle,
        policy="lru",
        look_ahead="off",
        n_ctx=_CONTEXT,
        n_sequences=_SEQUENCES,
    )
    try:
        if llm.engine is None:
            raise ProbeError(llm.engaged)
        run = SpreadRun(llm, shape)
        say("Measuring steps of many tokens")
        slots = shape.slots(int(llm.expert_stats()["budget_bytes"]))
        width = run.spread(min(n // len(c.layers) for n, c in zip(slots, shape.classes, strict=True)))
        still = _still(run)
        cell_s = _cell_s(run, still)
        output_s = output_seconds(run, max(n for n in still if n <= OUTPUTS))
        host_s = host_seconds(llm, run)
        say("Measuring steps whose experts are missing")
        llm.set_ram_budget(budget_of_one_token(shape))
        run.spread(int(PATIENCE_S * measured.disk_bytes_per_s / (info.n_layer * shape.expert_bytes)))
        moving = {n: _moving(run, n) for n in sorted({1, min(MOST_TOKENS, run.tokens(_MISSING_ROWS))})}
        missing_width = run.width
    finally:
        llm.close()
    kernels = {tokens: step.kernels for tokens, step in still.items()}
    pass_s = 0.0 if width < 2 * info.n_expert_used else pass_seconds(kernels[1], kernels.get(2, 0.0), info.n_layer)
    expert = expert_points(kernels, width, info.n_layer, info.n_expert_used, pass_s)
    others = ((t, (s.wall - s.kernels - cell_s * t * cells_looked_at(t)) / info.n_layer) for t, s in still.items())
    layer = rising(tuple((t, max(1e-9, other)) for t, other in others))
    costs = _put_together(shape, measured, layer, expert, pass_s)
    costs = replace(costs, cell_s=cell_s, output_s=output_s, host_s=host_s)
    return replace(_with_missing(costs, shape, moving, missing_width), measured=True)


def _with_missing(costs: Costs, shape: ModelShape, moving: Mapping[int, SpreadStep], width: int) -> Costs:
    """What steps show in which everything was missing: {tokens: step}, few tokens and many."""
    info = shape.info
    few, many = moving[min(moving)], moving[max(moving)]
    if not few.misses < many.misses:
        return costs  # every expert of a layer is used by each token: what the probe has seen is all there is
    transfer, latency = pace(few.io, few.misses, many.io, many.misses, info.n_layer)
    miss, rest = [], []
    for n, step in moving.items():
        rows = max(1, round(n * info.n_expert_used / width))
        # Only the token with an output comes to the last layer's experts.
        used = {1: info.n_expert_used} if n == 1 else {rows: width}
        kernels = sum(count * float(costs.expert_s(r)) for r, count in used.items()) + costs.pass_s
        last = info.n_expert_used * float(costs.expert_s(1)) + costs.pass_s
        other = info.n_layer * costs.layer_s(n) + costs.cell_s * n * cells_looked_at(n)
        there = other + (info.n_layer - 1) * kernels + last
        miss.append((rows, max(0.0, step.working - there) / step.misses))
        rest.append((rows, max(0.0, step.wall - step.io - other) / info.n_layer))
    return replace(costs, transfer_s=transfer, latency_s=latency, miss=tuple(miss), rest=tuple(rest))


def estimated_costs(shape: ModelShape, measured: Measured) -> Costs:
    """From `pyengine plan`'s measurement alone: between one token and a long prompt everything is taken as linear."""
    info = shape.info
    one = measured.expert_share * measured.token_s / (info.n_layer * info.n_expert_used)
    many = 64
    expert = rising(((1, max(one, 1e-9)), (many, max(one, measured.pair_s * many))))
    alone = (1 - measured.expert_share) * measured.token_s
    layer = rising(
        ((1, max(1e-9, alone / info.n_layer)), (512, max(1e-9, 512 * measured.prompt_token_s / info.n_layer)))
    )
    head = max(0.0, alone - measured.prompt_token_s)
    return replace(_put_together(shape, measured, layer, expert, 0.0), output_s=head)


def _put_together(shape: ModelShape, known: Measured, layer: Points, expert: Points, pass_s: float) -> Costs:
    info = shape.info
    transfer = known.load_s
    if known.bundle and known.disk_bytes_per_s > 0:
        # A token's few loads begin together in each layer and end before the next: many come at the disk's pace.
        # Without a bundle they also are repacked, of which the disk knows nothing.
        transfer = min(transfer, (known.bytes_per_miss or shape.expert_bytes) / known.disk_bytes_per_s)
    miss_s = min(known.prompt_miss_s, transfer)
    # One missing expert takes longer than that by what is not pace: see inequalities.step_time for one token.
    first, added = known.missing[0]
    hidden = (info.n_expert_used - first) * expert[0][1] + pass_s
    latency = max(0.0, added - first * (transfer + miss_s) + hidden) if first == 1 else 0.0
    return Costs(
        layer=layer,
        router_token_s=min(router_token_s(info.n_embd, info.n_expert), layer[-1][1] / layer[-1][0]),
        cell_s=known.prompt_past_s or known.token_past_s,
        output_s=0.0,
        host_s=0.0,
        expert=expert,
        pass_s=pass_s,
        miss=((1, miss_s), (2, miss_s)),
        rest=tuple((n, s + miss_s) for n, s in expert),
        transfer_s=transfer,
        latency_s=min(latency, max(known.disk_latency_s, added)),
        transfer_bytes=known.bytes_per_miss or shape.expert_bytes,
        recall=0.0,
        miss_factor=1.0,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        buffer_bytes=known.overhead_bytes,
        n_threads=known.n_threads,
        bundle=known.bundle,
        measured=False,
    )


def _room(shape: ModelShape, measured: Measured) -> int:
    """Bytes of slots: those of all experts, as far as there is memory, and patience to read them; those of two tokens
    at least."""
    least = min(shape.info.slot_bytes, 2 * budget_of_one_token(shape))
    memory = available_memory() - reserve() - shape.other_bytes - _CONTEXT * shape.kv_bytes_per_token
    most = min(memory - measured.overhead_bytes, int(2 * PATIENCE_S * measured.disk_bytes_per_s))
    return max(least, min(shape.info.slot_bytes, most))


def _still(run: SpreadRun) -> dict[int, SpreadStep]:
    """By tokens of a step, ascending: the fastest with nothing missing."""
    found: dict[int, SpreadStep] = {}
    run.step(run.tokens(2), all_outputs=True)  # the experts come, those of the last layer, too
    for n in sorted({1, 2, *(run.tokens(rows) for rows in ROWS)}):
        if n > MOST_TOKENS or (found and max(step.wall / m for m, step in found.items()) * n > PATIENCE_S):
            break
        run.step(n)  # memory for so many tokens is found
        steps = [step for step in run.samples(n, REPEATS) if not step.misses]
        if steps:
            found[n] = min(steps, key=lambda step: step.wall)
    if 1 not in found:
        raise ProbeError("so few experts stay in memory that no step is without a missing one")
    return found


def _moving(run: SpreadRun, tokens: int) -> SpreadStep:
    """Steps of so many tokens whose experts are missing: of each number the middle one in the faster half."""
    run.step(tokens)  # those before it have left the slots
    # Whatever the hypervisor does for our reads is part of what they cost.
    steps = sorted((run.step(tokens) for _ in range(REPEATS)), key=lambda step: step.wall)
    half = steps[: len(steps) // 2 + 1]
    return SpreadStep(*(statistics.median(values) for values in zip(*map(astuple, half), strict=True)))


def _cell_s(run: SpreadRun, still: dict[int, SpreadStep]) -> float:
    """What attention takes per token and cell, from a step that has the cells of other sequences beside its own."""
    n = max(n for n in still if n <= OUTPUTS)
    crowd = run.crowd(min(_CONTEXT // _SEQUENCES, max(still)), _SEQUENCES - 1)
    looked_at = cells_looked_at(crowd) - cells_looked_at(n)
    others = min(step.working - step.kernels for step in run.samples(n, 2 * REPEATS))
    run.alone()
    return max(0.0, others - (still[n].working - still[n].kernels)) / (n * looked_at) if looked_at > 0 else 0.0


def output_seconds(run: SpreadRun, n: int) -> float:
    """What the head takes per token more, from a step of n tokens all of whose logits are wanted. That all of them come
    to the last layer's experts is no part of it."""
    if n < 2:
        return 0.0
    some, every = (
        min(step.working - step.kernels for step in run.samples(n, REPEATS, all_outputs=outputs))
        for outputs in (False, True)
    )
    return max(0.0, every - some) / (n - 1)


def host_seconds(llm: Llama, run: SpreadRun) -> float:
    """Choosing a token, as a session does."""
    from pyengine.sessions import SamplingParams
    from pyengine.sessions.sampling import make_sampler

    run.step(1)  # logits to choose from
    sampler = make_sampler(llm, SamplingParams(seed=0))
    took = []
    try:
        for _ in range(2 * REPEATS):
            started = time.perf_counter()
            sampler.sample(llm._ctx, -1)
            took.append(time.perf_counter() - started)
    finally:
        sampler.close()  # type: ignore[no-untyped-call]
    return min(took)


def router_token_s(n_embd: int, n_expert: int, tokens: int = 64) -> float:
    """Seconds per token of a product of a router's shape. The engine's clock begins where the router has ended, so this
    only tells how attention's time and the router's are divided."""
    random = np.random.default_rng(0)
    weights = random.random((n_embd, n_expert), np.float32)
    inputs = random.random((tokens, n_embd), np.float32)
    took = []
    for _ in range(8 * REPEATS):
        started = time.perf_counter()
        np.matmul(inputs, weights)
        took.append(time.perf_counter() - started)
    return min(took) / tokens
