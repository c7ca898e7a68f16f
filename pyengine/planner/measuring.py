"""Finding the costs of a model on this machine: the measurements of `pyengine plan` (pyengine.planning.probe), and a
second short run for what only several tokens at once show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.planner.costs import Costs, Points, rising
from pyengine.planning.controlled_run import ControlledRun, budget_of_one_token
from pyengine.planning.measured import Measured
from pyengine.planning.probe import ProbeError
from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama

#: Rows to an expert that are measured, as far as one is expected to take no longer than the patience, seconds.
ROWS = (1, 2, 4, 8, 16, 64, 256)
_PATIENCE_S = 2.0
#: Steps of each kind, of which the fastest counts: other programs only ever make one slower.
_REPEATS = 4
#: Tokens all of whose logits are wanted, to see what the head takes.
_OUTPUTS = 16
_CONTEXT = 512


def measure_costs(
    shape: ModelShape,
    measured: Measured,
    say: Callable[[str], None] = lambda _: None,
    bundle: str | Path = "use",
) -> Costs:
    """Load the model with slots for two tokens' experts, and compute steps of many tokens that all use the same ones:
    each expert then has as many rows as there are tokens, and nothing is missing. Takes some seconds.

    Args:
        measured: what `pyengine plan` has measured.

    Raises:
        ProbeError: the model is not managed.
        PyengineError, OSError: it cannot be loaded or read.
    """
    from pyengine import Llama

    say("Loading")
    llm = Llama(
        shape.path,
        ram_budget=min(shape.info.slot_bytes, 2 * budget_of_one_token(shape)),
        bundle=bundle,
        policy="lru",
        look_ahead="off",
        n_ctx=_CONTEXT,
        n_sequences=2,  # cells as they are with several texts
    )
    try:
        if llm.engine is None:
            raise ProbeError(llm.engaged)
        run = ControlledRun(llm, shape)
        say("Measuring steps of many tokens")
        steps = _steps(run)
        output_s = _output_s(llm, run, max(n for n in steps if n <= _OUTPUTS))
        run.prompt(2, 0)  # logits to choose from
        host_s = min(_seconds(llm.sample) for _ in range(_REPEATS))
        two = _two_sets(llm, run, shape)
    finally:
        llm.close()
    pair_rows, wall = {n: kernels for n, (_, kernels) in steps.items()}, {n: w for n, (w, _) in steps.items()}
    pass_s = pass_seconds(pair_rows[1], two, shape.info.n_layer)
    expert = expert_points(pair_rows, shape.info.n_layer, shape.info.n_expert_used, pass_s)
    cell_s = measured.prompt_past_s or measured.token_past_s
    layer = rising(
        tuple((n, max(1e-9, (wall[n] - pair_rows[n] - cell_s * n * n / 2) / shape.info.n_layer)) for n in sorted(steps))
    )
    costs = _put_together(shape, measured, layer, expert, pass_s)
    return replace(costs, output_s=output_s, host_s=host_s, measured=True)


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
    miss_s = min(known.prompt_miss_s, known.load_s)
    # One missing expert takes longer than that by what is not pace: see inequalities.step_time for one token.
    first, added = known.missing[0]
    hidden = (info.n_expert_used - first) * expert[0][1] + pass_s
    latency = max(0.0, added - first * (known.load_s + miss_s) + hidden) if first == 1 else 0.0
    return Costs(
        layer=layer,
        router_token_s=min(router_token_s(info.n_embd, info.n_expert), layer[-1][1] / layer[-1][0]),
        cell_s=known.prompt_past_s or known.token_past_s,
        output_s=0.0,
        host_s=0.0,
        expert=expert,
        pass_s=pass_s,
        miss_s=miss_s,
        transfer_s=known.load_s,
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


def _steps(run: ControlledRun) -> dict[int, tuple[float, float]]:
    """By tokens of a step: (seconds, of these in expert kernels) of the fastest."""
    found: dict[int, tuple[float, float]] = {}
    run.prompt(2, 0)  # the experts come
    for n in ROWS:
        if found and max(wall / m for m, (wall, _) in found.items()) * n > _PATIENCE_S:
            break
        run.prompt(n, 0)  # memory for so many tokens is found
        steps = [step for step in (run.prompt(n, 0) for _ in range(_REPEATS)) if not step.misses]
        if steps:
            fastest = min(steps, key=lambda step: step.wall)
            found[n] = (fastest.wall, fastest.kernels)
    if 1 not in found:
        raise ProbeError("so few experts stay in memory that no step is without a missing one")
    return found


def _two_sets(llm: Llama, run: ControlledRun, shape: ModelShape) -> float:
    """Kernel seconds of two tokens that use different experts; 0 if there are not enough experts for that."""
    assert llm.engine is not None
    n_used = shape.info.n_expert_used
    if 2 * n_used > min(c.n_expert for c in shape.classes):
        return 0.0
    sets = np.arange(2 * n_used, dtype=np.int32).reshape(2, 1, n_used)
    llm.engine.native.set_replay(np.repeat(sets, shape.info.n_layer, axis=1))
    took = []
    for _ in range(_REPEATS + 1):
        run.forget(0)
        step = run.more(2)
        if not step.misses:
            took.append(step.kernels)
    return min(took, default=0.0)


def pass_seconds(one: float, two: float, n_layer: int) -> float:
    """What the kernels of a layer take for beginning at all, from those of one token, and of two with different experts
    (0: not known): the second set adds its experts and no beginning."""
    if n_layer < 2 or two <= one:
        return 0.0
    # llama.cpp lets only the token with an output come to the last layer's experts.
    experts = (two - one) / (n_layer - 1)
    return min(max(0.0, one / n_layer - experts), 0.9 * one / n_layer)


def expert_points(kernels: dict[int, float], n_layer: int, n_used: int, pass_s: float) -> Points:
    """(rows, seconds of one expert) from the kernels of steps of so many tokens that all use the same experts, one of
    the tokens with an output: llama.cpp lets no other come to the last layer's experts."""
    last = kernels[1] / n_layer
    points = [(1, (last - pass_s) / n_used)]
    for n in sorted(kernels):
        if n > 1 and n_layer > 1:
            points.append((n, max(1e-9, ((kernels[n] - last) / (n_layer - 1) - pass_s) / n_used)))
    return rising(tuple(points))


def _output_s(llm: Llama, run: ControlledRun, n: int) -> float:
    """What the head takes per token more, from a step of n tokens all of whose logits are wanted."""
    if n < 2:
        return 0.0
    some, every = (min(_other_s(llm, run, n, outputs) for _ in range(_REPEATS)) for outputs in (False, True))
    return max(0.0, every - some) / (n - 1)


def _other_s(llm: Llama, run: ControlledRun, n: int, all_outputs: bool) -> float:
    from llama_cpp import _internals

    run.forget(0)
    batch = _internals.LlamaBatch(n_tokens=n, embd=0, n_seq_max=1, verbose=False)
    try:
        batch.set_batch([max(0, llm.token_bos())] * n, 0, all_outputs)
        before = llm.expert_stats()
        started = time.perf_counter()
        llm._ctx.decode(batch)
        wall = time.perf_counter() - started
        return wall - (_kernels(llm.expert_stats()) - _kernels(before))
    finally:
        batch.close()  # type: ignore[no-untyped-call]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _kernels(stats: dict[str, Any]) -> float:
    return float(stats["compute_seconds"]) + float(stats["stall_seconds"])


def router_token_s(n_embd: int, n_expert: int, tokens: int = 64) -> float:
    """Seconds per token of a product of a router's shape. The engine's clock begins where the router has ended, so this
    only tells how attention's time and the router's are divided."""
    random = np.random.default_rng(0)
    weights = random.random((n_embd, n_expert), np.float32)
    inputs = random.random((tokens, n_embd), np.float32)
    took = []
    for _ in range(8 * _REPEATS):
        started = time.perf_counter()
        np.matmul(inputs, weights)
        took.append(time.perf_counter() - started)
    return min(took) / tokens
