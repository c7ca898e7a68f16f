"""Experiments made of contests: auto against the best of the baselines over a matrix of models, budgets and disks, and
against the papers' systems over a range of R. One sitting after the other: results go on where the last one ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyengine.bench.belady_misses import record_misses
from pyengine.bench.cells import Disk
from pyengine.bench.cgroups import Groups, remove_leftovers
from pyengine.bench.contest import Contest, Terms
from pyengine.bench.launch import launch
from pyengine.bench.results import CSV, RECORD, Run, write_record
from pyengine.bench.rounds import sigterm_as_interrupt
from pyengine.bench.rows import (
    ACTIVATION_PATH,
    AUTO,
    AUTO_MEMORY,
    LRU_BUNDLE,
    ON_DEMAND,
    STOCK_MMAP,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
)
from pyengine.bench.run import Order, prepare_models, record_of
from pyengine.bench.samples import COLUMNS, CsvWriter, Sample, read_samples
from pyengine.bench.sampling import PROBE_LIMIT_S, BenchModel, probe_of
from pyengine.bench.settings import Settings
from pyengine.errors import UsageError

NEVER_SLOWER, PAPERS = "never-slower", "papers"

#: Who plays.
CONTESTANTS: dict[str, tuple[str, ...]] = {
    NEVER_SLOWER: (AUTO_MEMORY, AUTO, LRU_BUNDLE, ON_DEMAND, STOCK_MMAP_PLAIN, STOCK_MMAP),
    PAPERS: (AUTO, LRU_BUNDLE, ACTIVATION_PATH, ON_DEMAND),
}

#: Bytes per second; None is the bare disk.
DISKS: tuple[int | None, ...] = (None, 500_000_000, 200_000_000, 50_000_000)

#: R = time to move an expert / time to compute a layer. The papers do not print theirs: a layer of compute hides 1 to
#: 1.4 transfers on ProMoE's machine and on Fate's larger one (R = 0.7 to 1); Fate's smaller one has a link of a quarter
#: of the speed (4 GB/s for 16: R = 4).
TRANSFER_RATIOS = (0.7, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        name: a key of CONTESTANTS.
        disks: limits for never-slower; ratios: for papers.
        minutes: no further round is begun after so many; None: until all is done.
    """

    name: str
    terms: Terms
    disks: Sequence[int | None] = DISKS
    ratios: Sequence[float] = TRANSFER_RATIOS
    minutes: float | None = None


def run_experiment(order: Order, experiment: Experiment, say: Callable[[str], None]) -> Run:
    """Measure, and add to what is in the folder: contests of which least is known first, cells that have their rounds
    not again.

    Raises:
        UsageError: the order cannot be carried out as it stands, or the machine is busy.
        PyengineError, OSError, ValueError: a model, trace or folder cannot be used; no control groups can be made.
        KeyboardInterrupt: what was measured until then is in the CSV.
    """
    kinds = CONTESTANTS[experiment.name]
    order = replace(order, settings=replace(order.settings, kinds=kinds, n_prompts=4))
    models = prepare_models(order, say)
    order.out.mkdir(parents=True, exist_ok=True)
    known = _known(order.out / CSV, experiment)
    content = record_of(order, models) | {"experiment": experiment.name, "caches": "drop_caches"}
    content = _continued(order.out / RECORD, content)
    if experiment.name == PAPERS:
        content["belady"] = record_misses(models, order.settings, order.out, content.get("belady", ()), say)
    write_record(order.out, content)
    remove_leftovers()
    end = time.monotonic() + 60 * experiment.minutes if experiment.minutes is not None else float("inf")
    with (
        sigterm_as_interrupt(),
        (order.out / CSV).open("a" if known else "w", encoding="utf-8", newline="") as file,
    ):
        table = CsvWriter(file, goes_on=bool(known))
        for sample in _samples(models, order.settings, experiment, known, say, lambda: time.monotonic() > end):
            table.add(sample)
    run = Run(order.out, known, content)
    if order.report is not None:
        from pyengine.bench.report import report

        order.report.parent.mkdir(parents=True, exist_ok=True)
        order.report.write_text(report([run], order.report), encoding="utf-8")
    return run


def _samples(
    models: Sequence[BenchModel],
    settings: Settings,
    experiment: Experiment,
    known: list[Sample],
    say: Callable[[str], None],
    late: Callable[[], bool],
) -> Iterator[Sample]:
    """Every sample as it is taken; they are added to `known`."""
    kinds = CONTESTANTS[experiment.name]
    contests = [
        Contest(model, share, kinds, settings, experiment.terms, known) for model in models for share in settings.shares
    ]
    # sorted() is stable: among equals, as they were asked for.
    for contest in sorted(contests, key=lambda contest: _n_known(contest, known)):
        if late():
            return
        if _done(contest, experiment):
            say(f"{contest}: all cells have {experiment.terms.rounds} rounds")
            continue
        probed = _probe(contest.model, settings)
        if experiment.name == NEVER_SLOWER:
            disks = [Disk(limit) for limit in experiment.disks]
        else:
            resident = _resident(contest, say)
            known.append(resident)
            yield resident
            disks = ratio_disks(contest.model, resident, experiment.ratios, probed, say)
        contest.probe_mb_per_s = probed
        yield from contest.play(sorted(disks, key=lambda disk: -(disk.bytes_per_s or 1 << 60)), say, late)


def ratio_disks(
    model: BenchModel, resident: Sample, ratios: Sequence[float], probed: float | None, say: Callable[[str], None]
) -> list[Disk]:
    """The disk limits at which moving one expert takes R times as long as computing a layer takes stock-resident;
    without those above what the disk gives (`probed`, MB/s). Raises UsageError without that speed."""
    if not resident.decode_tok_per_s:
        raise UsageError(f"{resident.model}: no speed of stock-resident to fix R with ({resident.reason})")
    layer_s = 1 / resident.decode_tok_per_s / model.facts.n_layer
    disks = []
    for ratio in ratios:
        limit = int(model.facts.record_bytes / (ratio * layer_s))
        if probed is not None and limit > probed * 1e6:
            say(f"{resident.model}: R = {ratio:g} needs {limit / 1e6:.0f} MB/s, the disk gives {probed:.0f}: left out")
            continue
        disks.append(Disk(limit, ratio))
    return disks


def _done(contest: Contest, experiment: Experiment) -> bool:
    """Whether no cell lacks rounds. Which ratios the disk allows is not known before it is probed: they are not."""
    if experiment.name != NEVER_SLOWER:
        return False
    return not any(contest.open(Disk(limit)) for limit in experiment.disks)


def _resident(contest: Contest, say: Callable[[str], None]) -> Sample:
    """A turn of stock-resident, alone."""
    alone = replace(contest, kinds=(STOCK_RESIDENT,), known=[])
    [sample] = alone.play([Disk(None)], say)
    number = sum((s.model, s.kind) == (sample.model, STOCK_RESIDENT) for s in contest.known)
    return replace(sample, row=STOCK_RESIDENT, round=number)


def _n_known(contest: Contest, known: Sequence[Sample]) -> int:
    where = (contest.model.facts.path.name, contest.share)
    return sum((sample.model, sample.share) == where and sample.kind == AUTO for sample in known)


def _probe(model: BenchModel, settings: Settings) -> float | None:
    """MB/s of the bare disk with reads of an expert."""
    task = probe_of(model, LRU_BUNDLE, settings.probe_s)
    outcome = launch("pyengine.bench.disk_probe", task, Groups(), PROBE_LIMIT_S)
    return float(outcome.result["bytes_per_s"]) / 1e6 if outcome.status == "ok" else None


def _known(path: Path, experiment: Experiment) -> list[Sample]:
    """Samples of earlier sittings. Raises UsageError if they are another experiment's."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        same = file.readline().rstrip("\n") == ",".join(COLUMNS)
    before = json.loads((path.parent / RECORD).read_text(encoding="utf-8")) if (path.parent / RECORD).is_file() else {}
    if not same or before.get("experiment") != experiment.name:
        raise UsageError(f"{path} holds other results; name another folder with --out")
    return read_samples(path)


def _continued(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The record of this sitting with the commands and models of those before."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"commands": [], "models": []}
    names = {model["name"] for model in content["models"]}
    return {
        **{name: before[name] for name in ("belady",) if name in before},
        **content,
        "commands": [*before["commands"], content["command"]],
        "models": [*(model for model in before["models"] if model["name"] not in names), *content["models"]],
    }
