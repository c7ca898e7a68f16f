"""What the programs about batches and prompts share: fresh processes in control groups that begin with an empty page
cache, as those of `pyengine bench`, and ratios of what they give."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.bench import quiet
from pyengine.bench.bundle_file import find_bundle
from pyengine.bench.cgroups import DiskLimit, block_device, groups, remove_leftovers
from pyengine.bench.launch import Outcome, launch
from pyengine.bench.model_facts import read_facts
from pyengine.bench.run import bytes_per_second
from pyengine.bench.summary import interval
from pyengine.bundled import bundled_model

#: Seconds that loading may take, on the slowest disk that is simulated.
LOADING_S = 900.0


@dataclass(frozen=True)
class Cold:
    """How a process ended, and what other programs did meanwhile (processors' worth)."""

    outcome: Outcome
    other_cpu: float

    @property
    def result(self) -> Mapping[str, Any]:
        """What it printed; empty if it failed."""
        return self.outcome.result


class ColdRuns:
    """
    Args:
        model: GGUF file; None: the bundled one. Its bundle is made if there is none that fits.
        disk: what the disk may give per second, as in "200M"; None: all it has.

    Raises:
        CgroupError: the disk cannot be limited.
        PyengineError: the model has no experts that are managed, or its bundle cannot be made.
    """

    def __init__(self, model: str | None, disk: str | None) -> None:
        self.model = Path(model or bundled_model()).resolve()
        self.facts = read_facts(self.model)
        self.bundle = find_bundle(self.facts, make=True, say=print)
        self.bytes_per_s = bytes_per_second(disk) if disk else None
        where = self.bundle or self.model
        self._disk = DiskLimit(block_device(where), self.bytes_per_s) if self.bytes_per_s else None
        os.environ["PYTHONPATH"] = os.pathsep.join(  # `python -m` finds the workers beside this file
            part for part in (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")) if part
        )
        remove_leftovers()
        with groups(None, self._disk):
            pass
        print(f"{self.model.name}, experts from {where.name}" + (f", {disk}B/s" if disk else ""), flush=True)

    def run(self, module: str, task: Mapping[str, Any], limit: int | None, seconds: float) -> Cold:
        """Run a worker of this folder.

        Args:
            task: what it reads as JSON; its last line of output is the result.
            limit: bytes of memory, page cache included; None: no limit.
            seconds: that its measurement takes at most.

        Raises:
            CgroupError: the memory cannot be limited.
        """
        quiet.drop_caches([*self.facts.files, *([self.bundle] if self.bundle else [])])
        before, ours = quiet.CpuClock.now(), _our_cpu()
        with groups(limit, self._disk) as made:
            outcome = launch(module, task, made, LOADING_S + 3 * seconds)
        other, _ = quiet.CpuClock.now().others_since(before, _our_cpu() - ours)
        return Cold(outcome, other)


def ratio(name: str, of: Mapping[int, float], to: Mapping[int, float]) -> str:
    """A line about what two columns gave in the rounds that both have: median of the ratios, and its 95 % interval."""
    pairs = [of[number] / to[number] for number in sorted(of.keys() & to.keys()) if to[number]]
    if not pairs:
        return f"{name}: -"
    low, high = interval(pairs) if len(pairs) > 1 else (pairs[0], pairs[0])
    return f"{name}: {statistics.median(pairs):.2f} (95 %: {low:.2f} .. {high:.2f}, rounds: {len(pairs)})"


def settings_of(arguments: Any) -> Sequence[str]:
    """What was asked for, for the header of the CSV; no folders."""
    given = (
        (name, Path(value).name if name == "model" and value else value) for name, value in vars(arguments).items()
    )
    return [f"{name}={value}" for name, value in sorted(given)]


def _our_cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
