"""A short run of the model itself, to learn what this machine does with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from pyengine.budget import available_memory, reserve
from pyengine.bundles import candidates
from pyengine.errors import ModelFileError, PyengineError, StaleBundleError
from pyengine.native import NativeEngine
from pyengine.planning.controlled_run import ControlledRun, Step, budget_of_one_token
from pyengine.planning.disk import measure_disk
from pyengine.planning.measured import Measured
from pyengine.planning.shape import ModelShape

#: Tokens of context the probe loads with: a prompt of _LONG, and more after it.
_CONTEXT = 768
_LONG = 512
#: Prompts to try, the longest of those that are expected to take no longer than this, seconds.
_PROMPTS = (16, 64, _LONG)
_PATIENCE_S = 2.0


class ProbeError(PyengineError):
    """The model cannot be measured here and now."""


class _Tokens(NamedTuple):
    """Of decoding, see Measured. `n_past` tokens of context came before each."""

    token_s: float
    expert_share: float
    missing: tuple[tuple[int, float], ...]
    bytes_per_miss: float
    n_past: int


class _Prompts(NamedTuple):
    """Of prompts, see Measured; and what context adds to decoding."""

    prompt_token_s: float
    prompt_past_s: float
    pair_s: float
    prompt_miss_s: float
    token_past_s: float


def measure(shape: ModelShape, say: Callable[[str], None] = lambda _: None, bundle: str | Path = "use") -> Measured:
    """Load the model with slots for one token's experts and measure it. Takes some seconds; more with huge experts.

    Args:
        say: told what is being done, for a progress display.
        bundle: see pyengine.bundles.use_bundle.

    Raises:
        ProbeError: too little memory for it, or the model is not managed.
        PyengineError, OSError: the model cannot be loaded or read.
    """
    from pyengine import Llama

    started = time.perf_counter()
    budget, context = budget_of_one_token(shape), _CONTEXT * shape.kv_bytes_per_token
    if budget + context + shape.other_bytes > available_memory() - reserve() // 2:
        raise ProbeError("there is too little free memory to measure this model")
    say("Loading")
    before = psutil.Process().memory_info().rss
    llm = Llama(
        shape.path,
        gpu="off",
        ram_budget=budget,
        bundle=bundle,
        policy="lru",
        look_ahead="off",
        n_ctx=_CONTEXT,
    )
    try:
        if llm.engine is None:
            raise ProbeError(llm.engaged)
        run = ControlledRun(llm, shape)
        if run.most_missing == 0:
            raise ProbeError("every token uses every expert of this model")
        say("Measuring tokens")
        tokens = _measure_tokens(run)
        say("Measuring prompts")
        prompts = _measure_prompts(run, tokens)
        known = shape.other_bytes + context + int(llm.expert_stats()["resident_bytes"])
        overhead = psutil.Process().memory_info().rss - before - known
        n_threads = int(llm.n_threads)
    finally:
        llm.close()
    say("Reading the disk")
    n_reads = 1 if run.bundle else shape.classes[0].n_matrix
    disk = measure_disk(run.bundle or shape.path, int(shape.expert_bytes / n_reads))
    return Measured(
        token_s=tokens.token_s,
        token_past_s=prompts.token_past_s,
        expert_share=tokens.expert_share,
        missing=tokens.missing,
        prompt_token_s=prompts.prompt_token_s,
        prompt_past_s=prompts.prompt_past_s,
        pair_s=prompts.pair_s,
        prompt_miss_s=prompts.prompt_miss_s,
        bytes_per_miss=tokens.bytes_per_miss,
        overhead_bytes=max(0, overhead),
        disk_bytes_per_s=disk.bytes_per_s,
        disk_latency_s=disk.latency_s,
        n_threads=n_threads,
        direct_io=shape.info.direct_io,
        bundle=run.bundle is not None,
        took_s=time.perf_counter() - started,
    )


def now_used_bundle(path: Path) -> bool:
    """Whether an engine that is opened now would read this model's experts from a bundle. Raises PyengineError."""
    engine = NativeEngine(path)
    try:
        for bundle in candidates(path):
            try:
                if bundle.is_file():
                    engine.use_bundle(bundle)
                    return True
            except (StaleBundleError, ModelFileError):
                pass  # whoever loads the model says so
        return False
    finally:
        engine.close()


def _measure_tokens(run: ControlledRun) -> _Tokens:
    run.prompt(_PROMPTS[0], 0)
    n_past = run.n_past
    still = run.samples(lambda: run.decode(0, n_past))
    token = _typical(step.wall for step in still)
    missing, n_read, n_miss, longest = [], 0, 0, 0.0
    for m in sorted({1, -(-run.most_missing // 2), run.most_missing}):
        steps = [s for s in run.samples(lambda m=m: run.decode(m, n_past)) if s.misses]  # type: ignore[misc]
        if not steps:
            raise ProbeError("so few experts stay in memory that none can be made to be missing")
        # A disk is often slower for a while: that is how it is, and not noise of other programs. But more missing never
        # take less time; what seems so is noise.
        longest = max(longest, (statistics.median(step.wall for step in steps) - token) / run.n_layer)
        missing.append((m, longest))
        n_read, n_miss = n_read + sum(s.bytes_read for s in steps), n_miss + sum(s.misses for s in steps)
    share = _typical(step.kernels for step in still) / token
    return _Tokens(token, min(1.0, share), tuple(missing), n_read / n_miss, n_past)


def _measure_prompts(run: ControlledRun, tokens: _Tokens) -> _Prompts:
    steps: dict[int, Step] = {}  # by tokens
    for n in _PROMPTS:
        if steps and max(s.wall / m for m, s in steps.items()) * n > _PATIENCE_S:
            break
        # The first one has to find memory for n tokens.
        steps[n] = _fastest(run.prompt(n, 0) for _ in range(2))
    n, step = max(steps.items())
    prompt_past = token_past = 0.0  # of large experts, next to which attention is nothing
    if n == _LONG:
        still = run.samples(lambda: run.decode(0, n))
        token_past = max(0.0, _typical(s.wall for s in still) - tokens.token_s) / (n - tokens.n_past)
        run.forget(n)
        later = run.more(_CONTEXT - n)
        # The means of the context before a token differ by half of all of it.
        prompt_past = max(0.0, later.other / (_CONTEXT - n) - step.other / n) / (_CONTEXT / 2)
    # The last layer computes one token only.
    pair = step.kernels / ((run.n_layer - 1) * n + 1) / run.n_used
    # What a miss adds is best seen in a prompt that is not too long.
    m = max(length for length in steps if length < _LONG)
    cold = _fastest(run.prompt(m, run.most_missing) for _ in range(3))
    adds = max(0.0, cold.wall - steps[m].wall) / max(1, cold.misses)
    return _Prompts(
        prompt_token_s=max(0.0, step.other / n - prompt_past * n / 2),
        prompt_past_s=prompt_past,
        pair_s=pair,
        # Beside kernels some of a load is hidden; it never grows.
        prompt_miss_s=min(adds, tokens.missing[-1][1] / tokens.missing[-1][0]),
        token_past_s=token_past,
    )


def _fastest(steps: Iterable[Step]) -> Step:
    return min(steps, key=lambda step: step.wall)


def _typical(values: Iterable[float]) -> float:
    """The middle of the faster half: other programs only ever make a sample slower."""
    ordered = sorted(values)
    return statistics.median(ordered[: len(ordered) // 2 + 1])
