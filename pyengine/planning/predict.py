"""Speeds from what a model is, which experts are missing, and what this machine was measured to do. Pure.

A decoded token with nothing missing takes token_s. A layer in which m experts are missing takes longer by a measured
amount: residents compute while the missing load, several at a time, so it grows almost linearly from the first one.

A prompt is computed in micro-batches. In each layer its kernels run while experts arrive: whichever is slower sets the
pace, the last expert to arrive computes alone, and loading takes some of the kernels' cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyengine.planning.measured import Measured
from pyengine.planning.routing import Misses

#: Tokens that llama_cpp.Llama computes at once unless told otherwise.
MICRO_BATCH = 512


@dataclass(frozen=True)
class ExpertCounts:
    """Of ModelShape, what a prediction needs."""

    n_layer: int
    n_expert_used: int


def decode_seconds(measured: Measured, misses: Misses, n_past: int) -> float:
    """Seconds per token after `n_past` tokens of context."""
    points = np.array([(0.0, 0.0), *measured.missing])
    # np.interp is flat beyond the last point, which is the most that one token can miss.
    longer = np.interp(np.arange(misses.of_layer.shape[1]), points[:, 0], points[:, 1])
    return measured.token_s + n_past * measured.token_past_s + float((misses.of_layer @ longer).sum())


def prefill_seconds(
    measured: Measured, counts: ExpertCounts, n_token: int, misses_of: Callable[[int, bool], Misses], *, cold: bool
) -> float:
    """Seconds for a prompt of `n_token` tokens at the start of a context.

    misses_of: (tokens of a micro-batch, whether it is the first one after loading) -> what it misses.
    """
    total, done = 0.0, 0
    while done < n_token:
        n = min(MICRO_BATCH, n_token - done)
        total += _micro_batch(measured, counts, n, done, misses_of(n, cold and done == 0))
        done += n
    return total


def _micro_batch(measured: Measured, counts: ExpertCounts, n: int, n_past: int, misses: Misses) -> float:
    other = n * (measured.prompt_token_s + (n_past + n / 2) * measured.prompt_past_s)
    decode_access = measured.expert_share * measured.token_s / (counts.n_layer * counts.n_expert_used)
    experts = 0.0
    for layer in range(counts.n_layer):
        # llama.cpp needs only the last token after the last layer's attention.
        last = layer == counts.n_layer - 1
        tokens = 1 if last else n
        wanted = min(float(misses.wanted[layer]), counts.n_expert_used) if last else float(misses.wanted[layer])
        missing = float(misses.per_layer[layer]) * (wanted / max(1.0, float(misses.wanted[layer])))
        # A pair costs less with many tokens to an expert; an expert's weights pass through the caches once anyway.
        pairs = tokens * counts.n_expert_used
        kernels = max(pairs * measured.pair_s, 0.0) + wanted * max(0.0, decode_access - measured.pair_s)
        loading = missing * measured.load_s
        one = kernels / wanted if wanted else 0.0
        experts += max(kernels + missing * measured.prompt_miss_s, loading + one if missing else 0.0)
    return other + experts
