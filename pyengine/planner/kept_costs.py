"""The file in which a model's costs are kept, beside its profile (pyengine.advice.profile), and what the last run was
like against its plan.

JSON: format, version, key (the model's file, the machine, the versions: pyengine.planning.measured.machine_key), costs,
run. Written whole or not at all; a file that is damaged, foreign, of another version, model or machine is as good as
none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pyengine.advice.profile import profile_file
from pyengine.planner.costs import Costs
from pyengine.whole_file import written_whole

FORMAT, VERSION = "pyengine costs", 3

_FAULTS = (OSError, ValueError, KeyError, TypeError, RecursionError)
_MOST_BYTES = 1 << 20
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class LastRun:
    """A batch run, and what was planned for it. Seconds are medians of a step in which no prompt was computed."""

    n_sequences: int
    n_steps: int
    planned_step_s: float
    actual_step_s: float

    @property
    def error(self) -> float:
        """Of the plan, as a share of the actual time; negative: it promised too much."""
        return self.planned_step_s / self.actual_step_s - 1


@dataclass(frozen=True)
class Kept:
    costs: Costs
    run: LastRun | None = None


def costs_file(model: Path, device: str = "") -> Path:
    """Where the costs of this model file are kept, on the ggml device of that name if its memory has the slots. Raises
    OSError: no such model."""
    where = "".join(c if c.isalnum() else "_" for c in device)
    return profile_file(model).with_suffix(f".{where}.costs.json" if where else ".costs.json")


def load_costs(path: Path, key: dict[str, Any]) -> Kept | None:
    """What is kept under this key; None if there is nothing usable."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST_BYTES).decode("utf-8"))
        if (content["format"], content["version"], content["key"]) != (FORMAT, VERSION, json.loads(json.dumps(key))):
            return None
        given = dict(content["costs"])
        for name in ("layer", "expert", "miss", "rest"):
            given[name] = tuple((n, float(s)) for n, s in given[name])
        costs = _of(Costs, given)
        run = None if content["run"] is None else _of(LastRun, content["run"])
    except _FAULTS:
        return None
    return Kept(costs, run if run is None or _sane(run) else None) if costs.sound else None


def save_costs(path: Path, key: dict[str, Any], kept: Kept) -> None:
    """Keep them. Raises OSError; the old ones are as they were."""
    run = None if kept.run is None else asdict(kept.run)
    content = {"format": FORMAT, "version": VERSION, "key": key, "costs": asdict(kept.costs), "run": run}
    with written_whole(path, durable=False) as file:
        file.write(json.dumps(content, indent=1).encode())


_KINDS: dict[str, type] = {"bool": bool, "str": str}
_READERS: dict[str, Callable[[Any], Any]] = {"float": float, "int": int}


def _of(kind: type[_Kind], given: dict[str, Any]) -> _Kind:
    """A dataclass of numbers and flags from JSON; what is missing or too much is a KeyError or TypeError."""
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = given[field.name]
        if field.type in _READERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(field.name)
        if field.type in _KINDS and not isinstance(value, _KINDS[str(field.type)]):
            raise TypeError(field.name)
        values[field.name] = _READERS[str(field.type)](value) if field.type in _READERS else value
    return kind(**values)


def _sane(run: LastRun) -> bool:
    seconds = (run.planned_step_s, run.actual_step_s)
    return run.n_sequences > 0 and run.n_steps > 0 and all(math.isfinite(s) and s > 0 for s in seconds)
