"""Costs corrected by what the steps of a running model take: running medians of actual over foretold. Pure.

Four things are told apart, because the engine counts them apart: its kernels, what is missing, reading, and all else.
Each is corrected by one factor; what was measured about how they grow with the number of tokens stays. What the engine
waited follows from them, but for how evenly experts come: that is the fifth, the rest after the last one, such that
the inequalities give as much waiting as there was.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pyengine.planner.costs import Costs
from pyengine.planner.demand import Demand, StepDemand
from pyengine.planner.inequalities import StepShape
from pyengine.planner.step_times import step_time

#: Steps that the medians are of; fewer than the least say nothing yet.
_STEPS, _LEAST = 64, 5
#: A factor beyond these is no correction but a mistake: a suspended machine, a clock that was set.
_SMALLEST, _LARGEST = 0.05, 20.0
#: Waiting that is foretold this well, as a share of a step, needs no correction; halvings that find one.
_NEAR, _HALVINGS = 0.01, 12


@dataclass(frozen=True)
class StepRecord:
    """One step as it was. Seconds; counts are of all layers together."""

    sequences: int
    """texts that decoded, a token each"""
    chunk: int
    """tokens of prompts"""
    cells: float
    """KV cells in use"""
    wall_s: float
    """from the end of the step before to the end of this one"""
    compute_s: float
    """in expert kernels"""
    stall_s: float
    """kernels waited for experts"""
    io_s: float
    """with at least one load under way"""
    wanted: int
    """distinct experts; missing: of those, when the router spoke; loaded: for them, then or ahead"""
    missing: int
    loaded: int


class Refiner:
    """
    Args:
        costs: as measured; demand: as the plan's.
        slots: of each shape class, now; a change of the budget changes what it returns.
    """

    def __init__(self, costs: Costs, demand: Demand, slots: Callable[[], Sequence[int]]) -> None:
        self._measured, self._demand, self._slots = costs, demand, slots
        self._as_counted = replace(costs, miss_factor=1.0, recall=0.0)  # for steps whose misses are known
        self._ratios: dict[str, deque[float]] = {
            name: deque(maxlen=_STEPS) for name in ("compute", "other", "transfer", "misses")
        }
        self._waits: deque[tuple[StepRecord, StepDemand]] = deque(maxlen=_STEPS)
        self._walls: dict[tuple[int, int], deque[float]] = {}
        self.n_steps = 0

    def observe(self, record: StepRecord) -> None:
        """A step was computed."""
        if record.sequences + record.chunk <= 0 or record.wall_s <= 0:
            return
        self.n_steps += 1
        walls = self._walls.setdefault((record.sequences, record.chunk), deque(maxlen=_STEPS))
        walls.append(record.wall_s)
        demand = self.demand_of(record)
        shape = self.shape_of(record)
        missed = _as_missed(demand, record, self._moved(record))
        self._waits.append((record, missed))
        plain = step_time(self._as_counted, shape, missed)
        if self._measured.device:
            # A GPU's kernels are not timed: all that was not waiting is computing.
            for name in ("compute", "other"):
                self._note(name, record.wall_s - record.stall_s, plain.attention + plain.experts)
        else:
            self._note("compute", record.compute_s, plain.experts)
            self._note("other", record.wall_s - record.compute_s - record.stall_s, plain.attention)
        missing = demand.missing * demand.n_layer * self._measured.miss_factor
        if missing >= 1:
            self._note("misses", self._moved(record), missing)
        if self._measured.device and not self._streams(record):
            self._note("transfer", record.stall_s, plain.waiting)  # nothing but waiting, and all of it
        elif self._moved(record):
            self._note("transfer", record.io_s, plain.reading * record.loaded / self._moved(record))

    def _streams(self, record: StepRecord) -> bool:
        """Whether layers' missing experts were fetched unasked, as the costs mean it."""
        return 0 < self._measured.stream_tokens <= record.sequences + record.chunk

    def _moved(self, record: StepRecord) -> int:
        """Experts that the costs count as missing: of steps that fetch a layer unasked, those that came early, too."""
        return record.loaded if self._streams(record) else record.missing

    def _note(self, name: str, actual: float, foretold: float) -> None:
        if foretold > 0 and _SMALLEST <= actual / foretold <= _LARGEST:
            self._ratios[name].append(actual / foretold)

    @property
    def factors(self) -> dict[str, float]:
        """Actual over measured: "compute", "other", "transfer", "misses", "rest"; 1 where too little was seen."""
        found = {name: statistics.median(seen) if len(seen) >= _LEAST else 1.0 for name, seen in self._ratios.items()}
        return found | {"rest": self._rest(self._as_counted.scaled(**(found | {"misses": 1.0})))}

    def _rest(self, corrected: Costs) -> float:
        """By what the rest after the last arrival is to be multiplied, with all else corrected."""

        def too_long(factor: float) -> float:
            costs = corrected.scaled(rest=factor)
            steps = ((record, step_time(costs, self.shape_of(record), missed)) for record, missed in self._waits)
            return statistics.median((step.waiting - record.stall_s) / record.wall_s for record, step in steps)

        if len(self._waits) < _LEAST or abs(too_long(1.0)) <= _NEAR:
            return 1.0
        low, high = (0.0, 1.0) if too_long(1.0) > 0 else (1.0, _LARGEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if too_long(middle) > 0 else (middle, high)
        # Of factors that change nothing any more, the one that is nearest to what was measured.
        found = (low + high) / 2
        return found if abs(too_long(1.0)) > abs(too_long(found)) + _NEAR else 1.0

    @property
    def costs(self) -> Costs:
        """As corrected so far."""
        return self._measured.scaled(**self.factors)

    def actual_step_s(self, sequences: int, chunk: int = 0) -> float | None:
        """Median of steps of that kind; None: too few."""
        walls = self._walls.get((sequences, chunk), ())
        return statistics.median(walls) if len(walls) >= _LEAST else None

    def commonest(self) -> tuple[int, int] | None:
        """(texts, steps seen) of steps without a prompt, of the number of texts that there were most steps of."""
        kinds = [(len(walls), n) for (n, chunk), walls in self._walls.items() if not chunk and len(walls) >= _LEAST]
        n_step, n = max(kinds, default=(0, 0))
        return (n, n_step) if n_step else None

    def demand_of(self, record: StepRecord) -> StepDemand:
        """What the routing foretells for such a step."""
        return self._demand.of(record.sequences, record.chunk, tuple(self._slots()))

    def shape_of(self, record: StepRecord) -> StepShape:
        outputs = record.sequences + bool(record.chunk)
        return StepShape(record.sequences + record.chunk, outputs, record.cells, min(self._slots()))


def _as_missed(demand: StepDemand, record: StepRecord, moved: int) -> StepDemand:
    """The demand, with as many distinct and missing experts as there were: kernels are not to blame for misses."""
    n = demand.n_layer
    rows = float((demand.hot_rows + demand.cold_rows).mean())
    wanted, cold = record.wanted / n, min(moved, record.wanted) / n
    share = cold / wanted if wanted else 0.0
    hot, hot_rows, missing, cold_rows = (
        np.array([value]) for value in (wanted - cold, rows * (1 - share), cold, rows * share)
    )
    return StepDemand(hot, hot_rows, missing, cold_rows, n)
