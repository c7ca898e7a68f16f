"""Klotski's inequalities (arXiv 2502.06888, section 6), for an engine whose experts come from disk into RAM slots and
whose processor computes everything. Pure.

In a layer attention and router compute first. Experts that were guessed are read meanwhile. The router has spoken: the
experts that are here (hot) compute while the missing (cold) are read, which then compute in the order in which they
come. With A, G, E the times of attention, router and one expert, Q cold experts and T the time to read one, nothing
waits if

    A + G           >= K T             the K experts that are fetched ahead come before the router speaks
    hot             >= T0 + T          the first cold one is here when the hot ones are done
    hot + (Q-1) E   >= T0 + Q T        so are all others, the last one too

where T0 is what passes before they come at that pace. All but T grow with the number of texts n that are computed
together, and Q no longer does once a layer needs every expert: so there is a smallest n, if memory has room for the
texts. (Klotski also moves attention's and router's weights, its t_IO,A and t_IO,G. Ours stay in RAM: both are 0.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.planner.costs import Costs, cells_looked_at
from pyengine.planner.demand import StepDemand

Floats = npt.NDArray[np.float64]

#: The names of the inequalities, in order.
AHEAD, FIRST, ALL = "ahead", "first", "all"

#: Of a cold expert; less is none.
_NONE = 1e-9


@dataclass(frozen=True)
class Inequality:
    """Holds if `computing` takes at least as long as `reading`, seconds in one layer."""

    name: str
    computing: float
    reading: float
    words: str

    @property
    def holds(self) -> bool:
        return self.computing >= self.reading


@dataclass(frozen=True)
class StepTime:
    """Of one step, seconds; all layers."""

    total: float
    attention: float
    """all that is no expert: attention, routers, the head, choosing tokens"""
    experts: float
    """kernels"""
    waiting: float
    """for experts that are being read"""
    reading: float
    """experts are being read at the disk's own pace, somebody waiting or not"""


@dataclass(frozen=True)
class StepShape:
    """What is computed in a step."""

    tokens: int
    outputs: int
    """tokens whose logits are wanted"""
    cells: float
    """KV cells in use, of all texts: llama.cpp's attention looks at all of them"""
    slots: int
    """that a layer's experts can have at once"""


def step_time(costs: Costs, shape: StepShape, demand: StepDemand) -> StepTime:
    """The time of a step with that demand, mean of its samples."""
    window = layer_window(costs, shape, demand.n_layer)
    _, cold, hot_s, each_s = _layers(costs, demand, window)
    kernels = hot_s + cold * each_s
    cycle = _cycle(costs, each_s, shape.slots)
    whole = np.minimum(1.0, cold)  # part of an expert is that probability of one
    first = _times(whole, costs.latency_s + costs.transfer_s)
    rest = np.minimum(np.maximum(each_s, costs.rest_s(_cold_rows(demand))), cold * each_s)
    last = first + whole * rest + _times(np.maximum(0.0, cold - 1), cycle)
    ffn = np.maximum(np.maximum(kernels, first + cold * each_s), last)
    if shape.slots < 2:  # what computes is in the place of what comes: nothing overlaps
        ffn = hot_s + last
    n = demand.n_layer
    attention = n * window + costs.output_s * max(0, shape.outputs - 1) + costs.host_s * shape.outputs
    ahead = demand.cold * costs.miss_factor - cold
    reading = (_times(ahead + cold, costs.transfer_s) + _times(whole, costs.latency_s)).mean()
    # A limit of the disk, counted over the step: what is beyond attention and kernels is waited for.
    late = max(0.0, float(n * _times(ahead + cold, costs.limit_s).mean() - attention - n * ffn.mean()))
    return StepTime(
        total=float(attention + n * ffn.mean() + late),
        attention=float(attention),
        experts=float(n * kernels.mean()),
        waiting=float(n * (ffn - kernels).mean() + late),
        reading=float(n * reading),
    )


def layer_window(costs: Costs, shape: StepShape, n_layer: int) -> float:
    """Attention and router of one layer, seconds: A + G."""
    return costs.layer_s(shape.tokens) + costs.cell_s * shape.tokens * cells_looked_at(shape.cells) / n_layer


def inequalities(costs: Costs, shape: StepShape, demand: StepDemand) -> list[Inequality]:
    """The three, with the numbers of a mean layer."""
    window = layer_window(costs, shape, demand.n_layer)
    hot, cold, hot_s, each_s = (float(values.mean()) for values in _layers(costs, demand, window))
    ahead = demand.missing * costs.miss_factor - cold
    cycle = float(_cycle(costs, np.array([each_s]), shape.slots)[0])
    computing = hot_s if shape.slots >= 2 else 0.0  # with one slot nothing computes while something comes
    first = float(_times(min(1.0, cold), costs.latency_s + costs.transfer_s))
    rest = max(0.0, cold - 1)
    limited = float(_times(ahead + cold, costs.limit_s))  # begins with attention
    router = min(window, costs.router_token_s * shape.tokens)
    return [
        Inequality(
            AHEAD,
            window,
            float(_times(ahead, costs.transfer_s)),
            f"attention {_ms(window - router)}, router {_ms(router)}; K {ahead:.1f}",
        ),
        Inequality(FIRST, computing, first, f"{hot:.1f} hot experts"),
        Inequality(
            ALL,
            computing + rest * each_s,
            max(first + float(_times(rest, cycle)), limited - window),
            f"{hot:.1f} hot and {rest:.1f} cold experts of {_ms(each_s)}, Q {cold:.1f}",
        ),
    ]


def _layers(costs: Costs, demand: StepDemand, window: float) -> tuple[Floats, Floats, Floats, Floats]:
    """By sample: experts that are here when the router has spoken, and that are not; kernel seconds of all of the
    former, and of each of the latter."""
    missing = demand.cold * costs.miss_factor
    ahead = np.zeros_like(missing)
    if costs.recall > 0:
        pace = max(costs.transfer_s, costs.limit_s)
        room = window / pace if pace > 0 else np.inf
        ahead = np.minimum(costs.recall * missing, room)
    cold = missing - ahead
    cold = np.where(cold < _NONE, 0.0, cold)
    # Where the routing's misses are corrected, rows go with them.
    rows = _cold_rows(demand)
    each_s = np.where(demand.cold > 0, costs.expert_s(np.maximum(rows, 0.0)), 0.0)
    spared = demand.cold - cold  # negative if more are missing than foretold
    n_hot = np.maximum(demand.hot, _NONE)
    hot_each = np.where(demand.hot > 0, costs.expert_s(demand.hot_rows / n_hot), 0.0)
    hot_s = np.maximum(0.0, demand.hot * hot_each + np.where(spared > 0, spared * each_s, spared * hot_each))
    hot = np.maximum(0.0, demand.hot + spared)
    # Of the cold ones each is a pass of its own, which their miss_s has.
    more_s = np.where(cold > 0, costs.miss_s(rows), 0.0)
    return hot, cold, hot_s + np.minimum(1.0, hot) * costs.pass_s, each_s + more_s


def _cold_rows(demand: StepDemand) -> Floats:
    """Of a missing expert, mean of each sample."""
    return demand.cold_rows / np.maximum(demand.cold, _NONE)


def _times(count: Floats | float, seconds: Floats | float) -> Floats:
    """Their product; of nothing it is 0, also if one would take for ever."""
    some = np.asarray(count) > 0
    return np.where(some, np.where(some, count, 1.0) * seconds, 0.0)


def _cycle(costs: Costs, each_s: Floats, slots: int) -> Floats:
    """Seconds from one cold expert's arrival to the next: reading, unless there are so few slots that one must first
    compute to make room for another."""
    return np.maximum(costs.transfer_s, (costs.latency_s + costs.transfer_s + each_s) / max(1, slots))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
