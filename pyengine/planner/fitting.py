"""Costs from the seconds of steps whose tokens, experts and misses are known. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pyengine.planner.costs import Points


def pass_seconds(one: float, two: float, n_layer: int) -> float:
    """What the kernels of a layer take for beginning at all, from those of one token, and of two with different experts
    (0: not known): the second set adds its experts and no beginning."""
    if n_layer < 2 or two <= one:
        return 0.0
    # llama.cpp lets only the token with an output come to the last layer's experts.
    experts = (two - one) / (n_layer - 1)
    return min(max(0.0, one / n_layer - experts), 0.9 * one / n_layer)


def expert_points(kernels: Mapping[int, float], width: int, n_layer: int, n_used: int, pass_s: float) -> Points:
    """(rows, seconds of one expert) from the kernels of steps by their tokens, which use `width` experts of a layer
    alike. One of the tokens has an output: llama.cpp lets no other come to the last layer's experts.

    Not smoothed: with more rows the engine changes to kernels that are faster, so that more can take less time."""
    last = kernels[1] / n_layer
    points = {1: (last - pass_s) / n_used}
    for tokens in sorted(kernels):
        rows = round(tokens * n_used / width)
        if tokens > 1 and rows > 1 and n_layer > 1:
            points.setdefault(rows, max(1e-9, ((kernels[tokens] - last) / (n_layer - 1) - pass_s) / width))
    return tuple(sorted(points.items()))


def pace(few_s: float, few: int, many_s: float, many: int, n_layer: int) -> tuple[float, float]:
    """(seconds per expert, seconds before they come at that pace) of a layer's reads, from the time that a step's reads
    were under way when few were missing and when many were, all layers together."""
    each = (many_s - few_s) / (many - few)
    if not 0 < each <= many_s / many:  # the disk was slower meanwhile, or faster
        each = many_s / many
    return each, max(0.0, few_s - few * each) / n_layer
