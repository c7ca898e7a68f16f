"""The time of a step whose experts are in slots of a GPU's memory, and come over a link from RAM. Pure.

What differs from pyengine.planner.inequalities: the GPU computes one graph after the other, so that an expert which the
router has asked for is waited for by all of its layer; nothing hides it. What overlaps is what is known earlier. From
Costs.stream_tokens on a layer needs nearly all of its experts: those that are missing are moved while the layer before
computes, so that Klotski's first inequality is

    A + G + experts >= K T          the K missing experts of the next layer come while this one computes

and what is beyond it is waited for. With fewer tokens only guesses (Costs.recall) come in that time. The other two
inequalities have nothing on their left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.planner.costs import Costs
from pyengine.planner.demand import StepDemand
from pyengine.planner.inequalities import AHEAD, ALL, FIRST, Inequality, StepShape, StepTime, layer_window

Floats = npt.NDArray[np.float64]

#: Of a missing expert; less is none.
_NONE = 1e-9


def gpu_step_time(costs: Costs, shape: StepShape, demand: StepDemand) -> StepTime:
    """The time of a step with that demand, mean of its samples."""
    window, kernels, ahead, late = _layers(costs, shape, demand)
    n = demand.n_layer
    some = np.minimum(1.0, late) * costs.latency_s  # part of an expert is that probability of one
    waiting = some + late * costs.pace_s
    attention = n * window + costs.output_s * max(0, shape.outputs - 1) + costs.host_s * shape.outputs
    experts = float(n * kernels.mean())
    wait = float(n * waiting.mean())
    return StepTime(
        total=attention + experts + wait,
        attention=attention,
        experts=experts,
        waiting=wait,
        reading=float(n * ((ahead + late) * costs.pace_s + some).mean()),
    )


def gpu_inequalities(costs: Costs, shape: StepShape, demand: StepDemand) -> list[Inequality]:
    """The three, with the numbers of a mean layer."""
    window, each, ahead, late = _layers(costs, shape, demand)
    kernels, early, cold = float(each.mean()), float(ahead.mean()), float(late.mean())
    known = early + cold if _streams(costs, shape) else early
    first = min(1.0, cold) * (costs.latency_s + costs.pace_s)
    every = min(1.0, cold) * costs.latency_s + cold * costs.pace_s
    words = f"attention and router {_ms(window)}, experts {_ms(kernels)}; K {known:.1f}"
    waited = f"the GPU waits for {cold:.1f} experts that come once the router has spoken"
    if _streams(costs, shape):
        waited = f"{cold:.1f} experts come too late"
    return [
        Inequality(AHEAD, window + kernels, known * costs.pace_s, words),
        Inequality(FIRST, 0.0, first, waited),
        Inequality(ALL, 0.0, every, waited),
    ]


def _streams(costs: Costs, shape: StepShape) -> bool:
    """Whether the next layer's missing experts are moved whatever its router will say."""
    return 0 < costs.stream_tokens <= shape.tokens


def _layers(costs: Costs, shape: StepShape, demand: StepDemand) -> tuple[float, Floats, Floats, Floats]:
    """Seconds of a layer without its experts; by sample: of its experts' kernels, and experts that are moved while the
    layer before computes, and that are waited for."""
    window = layer_window(costs, shape, demand.n_layer)
    missing = demand.cold * costs.miss_factor
    distinct = demand.hot + demand.cold
    rows = (demand.hot_rows + demand.cold_rows) / np.maximum(distinct, _NONE)
    kernels = distinct * costs.expert_s(rows) + np.minimum(1.0, distinct) * costs.pass_s
    # What a miss costs beside waiting: slots are looked for, kernels begin later.
    kernels = kernels + missing * costs.miss_s(np.maximum(rows, 1.0))
    ahead = missing if _streams(costs, shape) else costs.recall * missing
    if costs.pace_s > 0:
        ahead = np.minimum(ahead, (window + kernels) / costs.pace_s)
    late = missing - ahead
    return window, kernels, ahead, np.where(late < _NONE, 0.0, late)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
