"""Takes one sample: probes the disk, empties the caches, runs a child in its control groups, judges what came back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pyengine.bench import quiet
from pyengine.bench.cgroups import CgroupError, DiskLimit, Groups, MemoryUse, block_device, groups
from pyengine.bench.child import Task
from pyengine.bench.launch import Outcome, launch
from pyengine.bench.plan_check import PlanCheck
from pyengine.bench.rows import (
    BUNDLED,
    GPU,
    LRU,
    LRU_BUNDLE,
    ON_DEMAND,
    STOCK_GPU,
    STOCK_MMAP,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
    ModelFacts,
    Row,
)
from pyengine.bench.samples import Sample, figures, same_tokens
from pyengine.bench.settings import Settings
from pyengine.errors import PyengineError

#: Seconds after which a disk probe is given up.
PROBE_LIMIT_S = 120.0
_NOTHING_SEEN = MemoryUse(None, 0, 0)


@dataclass(frozen=True)
class BenchModel:
    """A model and the bundle its lru-bundle rows use, None if there is none."""

    facts: ModelFacts
    bundle: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.facts.files, *([self.bundle] if self.bundle else []))


def task_of(model: BenchModel, row: Row, settings: Settings) -> Task:
    """What the child of a row is told."""
    return Task(
        model=str(model.facts.path),
        kind=row.kind,
        budget=row.budget,
        bundle=str(model.bundle) if row.kind in BUNDLED else "off",
        n_tokens=settings.n_tokens,
        n_prompts=settings.n_prompts,
        prefill_tokens=settings.prefill_tokens,
        limit_s=settings.decode_limit_s,
        n_threads=settings.n_threads,
        trace=str(settings.trace) if settings.trace else None,
        recall=settings.recall,
        gpu=settings.gpu if row.kind in GPU else None,
        share=row.share,
        n_layer=model.facts.n_layer,
    )


def probe_of(model: BenchModel, kind: str, seconds: float) -> dict[str, Any]:
    """What disk_probe is told for reads as large as those of a kind of row, from the file that it reads."""
    if kind in BUNDLED and model.bundle is not None:
        return {"file": str(model.bundle), "size": model.facts.record_bytes, "seconds": seconds}
    file = max(model.facts.files, key=lambda path: path.stat().st_size)
    return {"file": str(file), "size": model.facts.matrix_bytes, "seconds": seconds}


def obstacle(model: BenchModel, row: Row) -> str:
    """Why a row cannot be run now, a sentence; empty if it can."""
    if row.kind in BUNDLED and model.bundle is None:
        return f"{model.facts.path.name} has no bundle; gguf_tools bundle makes one"
    wanted, free = row.limit or model.facts.file_bytes + model.facts.allowance, psutil.virtual_memory().available
    if wanted > free:
        return f"it needs {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""


class Sampler:
    """Takes samples one after the other.

    Args:
        out: folder for the traces that checking the plan needs.
        run: starts one process; see launch().

    Attributes:
        caches: how the page cache was emptied, for the machine's record.
        probes: every disk probe's result.
    """

    def __init__(self, settings: Settings, out: Path, run: Callable[..., Outcome] = launch) -> None:
        self._settings = settings
        self._plan = PlanCheck(out, run, settings.sample_limit_s) if settings.check_plan else None
        self._run = run
        self._references: dict[tuple[str, bool], Sequence[Sequence[int]]] = {}
        self.caches = ""
        self.probes: list[dict[str, Any]] = []

    def check_disk_limit(self, model: BenchModel) -> None:
        """Raise CgroupError if the disk of the model cannot be limited as asked."""
        with groups(None, self._disk_limit(model)):
            pass

    def take(self, model: BenchModel, row: Row, number: int, order: int) -> Sample:
        """One sample of a row in round `number`. Whatever happens to the child is its status, not an exception."""
        settings, name = self._settings, model.facts.path.name
        sample = Sample(
            model=name,
            row=row.name,
            kind=row.kind,
            share=row.share,
            round=number,
            order=order,
            status="unsupported",
            reason="",
            budget_bytes=row.budget,
            limit_bytes=row.limit,
            disk_limit_mb_per_s=settings.disk_limit / 1e6 if settings.disk_limit else None,
            replay=settings.trace.name if settings.trace and not row.stock else "",
        )
        missing = obstacle(model, row)
        if missing:
            return replace(sample, reason=missing)
        probed = None if row.stock else self._probe(model, row)
        foretold = self._foretold(model, row)
        self.caches = quiet.drop_caches(model.files)
        fixed_work_s = quiet.fixed_work(settings.n_threads)
        before, ours = quiet.CpuClock.now(), _our_cpu()
        outcome, limited = self._limited(model, row)
        other, stolen = quiet.CpuClock.now().others_since(before, _our_cpu() - ours)
        sample = replace(
            sample,
            status=outcome.status,
            reason=outcome.reason,
            limit_bytes=row.limit if limited else None,
            probe_mb_per_s=probed,
            peak_group_bytes=outcome.memory.peak,
            limit_reached=outcome.memory.at_limit if row.limit and limited else None,
            other_cpu=other,
            stolen_cpu=stolen,
            fixed_work_s=fixed_work_s,
            **foretold,
        )
        if outcome.status != "ok":
            return sample
        return replace(sample, **figures(outcome.result), exact=self._exact(name, row, outcome.result["tokens"]))

    def _limited(self, model: BenchModel, row: Row) -> tuple[Outcome, bool]:
        """Run the child, and whether it had the memory limit of its row. Where no control group can be made,
        memory-mapped rows mean nothing and are not run; ours keep to their budget anyway and are run, with the lack in
        the reason."""
        try:
            with groups(row.limit, self._disk_limit(model)) as made:
                return self._child(model, row, made), True
        except CgroupError as error:
            lack = f"no cgroup: {error}"
        if row.kind in (STOCK_MMAP, STOCK_MMAP_PLAIN):
            return Outcome("not limited", lack, {}, _NOTHING_SEEN), False
        with groups(None, self._disk_limit(model)) as made:
            outcome = self._child(model, row, made)
        return replace(outcome, reason=outcome.reason or lack), False

    def _child(self, model: BenchModel, row: Row, made: Groups) -> Outcome:
        task = task_of(model, row, self._settings)
        outcome = self._run("pyengine.bench.child", asdict(task), made, self._settings.sample_limit_s)
        if row.stock and outcome.result.get("libraries"):
            raise PyengineError("a stock row has loaded pyengine's native part; its figures would not be stock's")
        return outcome

    def _foretold(self, model: BenchModel, row: Row) -> Mapping[str, Any]:
        """What the planner says of a row of ours now, as fields of Sample."""
        if self._plan is None or row.kind not in (ON_DEMAND, LRU, LRU_BUNDLE):  # the plan is that of plain LRU
            return {}
        facts = model.facts
        free = psutil.virtual_memory().available
        spare = min(facts.slot_bytes, free - facts.other_bytes - 2 * facts.allowance)
        with groups(None, self._disk_limit(model)) as made:
            return self._plan.forecast(task_of(model, row, self._settings), spare, made)

    @property
    def notes(self) -> list[str]:
        """What could not be found out, a sentence each."""
        return self._plan.notes if self._plan else []

    def _probe(self, model: BenchModel, row: Row) -> float | None:
        """MB/s that the disk gives at this moment with reads as large as this row's, from the file that it reads."""
        task = probe_of(model, row.kind, self._settings.probe_s)
        with groups(None, self._disk_limit(model)) as made:
            outcome = self._run("pyengine.bench.disk_probe", task, made, PROBE_LIMIT_S)
        if outcome.status != "ok":
            return None
        self.probes.append({"model": model.facts.path.name, "row": row.name, **outcome.result})
        return float(outcome.result["bytes_per_s"]) / 1e6

    def _exact(self, model: str, row: Row, tokens: Sequence[Sequence[int]]) -> str:
        """Compare with the first sample of stock-resident, or of stock-gpu on a GPU. With a replayed trace the router
        has no say, so that pyengine's rows are compared with the first of their own, and stock's with nothing."""
        replayed = self._settings.trace is not None
        where = (model, row.kind in GPU)
        if not row.stock if replayed else row.kind in (STOCK_RESIDENT, STOCK_GPU):
            self._references.setdefault(where, tokens)
        known = self._references.get(where)
        if known is None or (replayed and row.stock):
            return ""
        return "yes" if same_tokens(known, tokens) else "no"

    def _disk_limit(self, model: BenchModel) -> DiskLimit | None:
        limit = self._settings.disk_limit
        return DiskLimit(block_device(model.facts.path), limit) if limit else None


def _our_cpu() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
