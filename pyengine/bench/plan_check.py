"""Asks the planner about each row right before the row is measured, so that a disk whose speed drifts is the same for
both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyengine.bench.cgroups import Groups
from pyengine.bench.child import Task
from pyengine.bench.launch import Outcome


class PlanCheck:
    """
    Args:
        folder: for the traces of the benchmark's texts.
        run: starts one process; see launch.launch().
        limit_s: seconds after which a process is given up.

    Attributes:
        notes: what could not be found out, a sentence each.
    """

    def __init__(self, folder: Path, run: Callable[..., Outcome], limit_s: float) -> None:
        self._folder, self._run, self._limit_s = folder, run, limit_s
        self._traces: dict[str, Path | None] = {}
        self.notes: list[str] = []

    def forecast(self, task: Task, spare: int, made: Groups) -> Mapping[str, Any]:
        """The planner's figures for a row, as fields of Sample; empty if it has none.

        Args:
            spare: bytes of slots that the recording of the texts may take.
            made: control groups for the planner's probe: the disk limit, if there is one.
        """
        trace = self._trace(task, spare)
        if trace is None:
            return {}
        question = {name: getattr(task, name) for name in ("model", "bundle", "budget", "n_tokens", "prefill_tokens")}
        outcome = self._run("pyengine.bench.forecast", question | {"trace": str(trace)}, made, self._limit_s)
        if outcome.status != "ok":
            self.notes.append(f"no forecast of {task.kind} with {task.budget} bytes: {outcome.reason}")
        return outcome.result

    def _trace(self, task: Task, spare: int) -> Path | None:
        """The routing of these texts, recorded once for each model; None if that failed."""
        if task.model not in self._traces:
            out = self._folder / f"{Path(task.model).stem}.trace.npz"
            recording = {"task": asdict(replace(task, budget=max(task.budget, spare))), "out": str(out)}
            outcome = self._run("pyengine.bench.recording", recording, Groups(), self._limit_s)
            if outcome.status != "ok":
                self.notes.append(f"no trace of {Path(task.model).name}: {outcome.reason}")
            self._traces[task.model] = out if outcome.status == "ok" else None
        return self._traces[task.model]
