"""Medians of each row, ratios of rows from pairs of the same round, and how noisy it all was. Pure arithmetic."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.bench.rows import (
    ALL_KINDS,
    GPU,
    GPU_ON_DEMAND,
    ON_DEMAND,
    STOCK_GPU,
    STOCK_GPU_SPLIT,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
)
from pyengine.bench.samples import Sample, percentile

#: Rows that others are divided by.
BASELINES = (STOCK_RESIDENT, STOCK_MMAP_PLAIN, ON_DEMAND, STOCK_GPU, STOCK_GPU_SPLIT, GPU_ON_DEMAND)

#: Speeds that ratios are taken of.
SPEEDS = ("decode_tok_per_s", "decode_cold_tok_per_s", "prefill_tok_per_s")

_RESAMPLES = 4000


@dataclass(frozen=True)
class Ratio:
    """A row's speed over a baseline's. median, low, high: of the ratios of pairs taken in the same round; low and high
    are a 95 % bootstrap interval of the median from five pairs on, before that the smallest and the largest ratio."""

    median: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class RowSummary:
    """One row of one model over all rounds.

    Attributes:
        statuses: how many samples ended in which way.
        reasons: distinct reasons why samples were not ok, or not limited.
        medians: name of a numeric column -> median over the samples that are ok and have it.
        ratios: (baseline, speed) -> Ratio.
        exact: "yes" if every sample gave the reference's tokens, "no" if one did not, "" if there was nothing to
            compare.
    """

    model: str
    row: str
    kind: str
    share: float | None
    replay: str
    statuses: Mapping[str, int]
    reasons: Sequence[str]
    medians: Mapping[str, float]
    ratios: Mapping[tuple[str, str], Ratio]
    exact: str

    def as_json(self) -> dict[str, Any]:
        ratios = {
            f"{speed} / {baseline}": {"median": r.median, "low": r.low, "high": r.high, "pairs": r.pairs}
            for (baseline, speed), r in self.ratios.items()
        }
        return {**vars(self), "ratios": ratios, "label": LABEL_OF_REPLAY if self.replay else ""}


#: What must stand beside every figure taken with replayed ids.
LABEL_OF_REPLAY = "trace replay, text meaningless"


def summarise(samples: Sequence[Sample]) -> list[RowSummary]:
    """One summary for each row of each model, in the order in which they first ran."""
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.model, sample.row), []).append(sample)
    return [_row(group, grouped) for group in grouped.values()]


def _row(group: Sequence[Sample], grouped: Mapping[tuple[str, str], Sequence[Sample]]) -> RowSummary:
    first = group[0]
    statuses: dict[str, int] = {}
    for sample in group:
        statuses[sample.status] = statuses.get(sample.status, 0) + 1
    ratios = {}
    for baseline in BASELINES:
        if baseline != first.kind:
            same = baseline if baseline != STOCK_GPU_SPLIT or first.share is None else f"{baseline} {first.share:g}%"
            for speed in SPEEDS:
                found = ratio(group, grouped.get((first.model, same), ()), speed)
                if found is not None:
                    ratios[baseline, speed] = found
    marks = {sample.exact for sample in group if sample.exact}
    return RowSummary(
        model=first.model,
        row=first.row,
        kind=first.kind,
        share=first.share,
        replay=first.replay,
        statuses=statuses,
        reasons=sorted({sample.reason for sample in group if sample.reason}),
        medians=_medians(group),
        ratios=ratios,
        exact="no" if "no" in marks else "yes" if marks else "",
    )


def _medians(group: Sequence[Sample]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for sample in group:
        for name, value in vars(sample).items():
            # What a killed process leaves behind is its peak of memory.
            counts = sample.status == "ok" or name == "peak_group_bytes"
            if counts and isinstance(value, (int, float)) and name not in ("round", "order", "share"):
                values.setdefault(name, []).append(value)
    return {name: statistics.median(found) for name, found in values.items()}


def ratio(group: Sequence[Sample], baseline: Sequence[Sample], speed: str) -> Ratio | None:
    """`speed` of group over that of baseline; None without a round in which both were measured."""
    theirs = {sample.round: getattr(sample, speed) for sample in baseline if sample.status == "ok"}
    pairs = [
        getattr(sample, speed) / theirs[sample.round]
        for sample in group
        if sample.status == "ok" and getattr(sample, speed) and theirs.get(sample.round)
    ]
    if not pairs:
        return None
    low, high = interval(pairs) if len(pairs) >= 5 else (min(pairs), max(pairs))
    return Ratio(statistics.median(pairs), low, high, len(pairs))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    tail = _RESAMPLES // 40
    return medians[tail], medians[-tail - 1]


@dataclass(frozen=True)
class Noise:
    """How steady the machine was.

    Attributes:
        fixed_work: (90th - 10th percentile) / median of the seconds that fixed work took before each sample.
        resident: model -> (largest - smallest) / median of stock-resident's decoding speed over the rounds.
        other_cpu, stolen_cpu: the worst sample's, processors' worth.
    """

    fixed_work: float | None
    resident: Mapping[str, float]
    other_cpu: float | None
    stolen_cpu: float | None

    def sentence(self) -> str:
        """The same in words."""
        parts = []
        if self.fixed_work is not None:
            parts.append(f"fixed work before each sample varied by {self.fixed_work:.1%} (10th to 90th percentile)")
        parts += [f"stock-resident decode of {name} by {spread:.1%}" for name, spread in self.resident.items()]
        if self.other_cpu is not None:
            parts.append(f"other programs took at most {self.other_cpu:.2f} processors during a sample")
        if self.stolen_cpu:
            parts.append(f"the hypervisor at most {self.stolen_cpu:.2f}")
        return "; ".join(parts) or "unknown"


def noise(samples: Sequence[Sample]) -> Noise:
    """See Noise; what was not measured is None or absent."""
    work = [sample.fixed_work_s for sample in samples if sample.fixed_work_s]
    resident: dict[str, list[float]] = {}
    for sample in samples:
        if sample.kind == STOCK_RESIDENT and sample.decode_tok_per_s:
            resident.setdefault(sample.model, []).append(sample.decode_tok_per_s)
    return Noise(
        fixed_work=(percentile(work, 0.9) - percentile(work, 0.1)) / statistics.median(work) if len(work) > 1 else None,
        resident={
            name: (max(speeds) - min(speeds)) / statistics.median(speeds)
            for name, speeds in resident.items()
            if len(speeds) > 1
        },
        other_cpu=max((s.other_cpu for s in samples if s.other_cpu is not None), default=None),
        stolen_cpu=max((s.stolen_cpu for s in samples if s.stolen_cpu is not None), default=None),
    )


def faults(rows: Sequence[RowSummary]) -> list[str]:
    """What must not be: rows with other tokens than stock's, and samples that failed. One sentence each.

    stock-mmap-plain computes with other kernels than stock as it comes, so its tokens may differ; so may those of rows
    on a GPU, where kernels for prompts are chosen by the number of slots, and some experts may be computed on the CPU.
    """
    found = []
    for row in rows:
        if row.exact == "no" and row.kind not in (STOCK_MMAP_PLAIN, *GPU):
            found.append(f"{row.model}, {row.row}: other tokens than the reference's")
        for status in ("failed", "timed out"):
            if status in row.statuses:
                found.append(f"{row.model}, {row.row}: {row.statuses[status]} x {status} ({'; '.join(row.reasons)})")
    return found


def in_order(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """Rows by model, then by kind and budget."""
    kinds, models = list(ALL_KINDS), list(dict.fromkeys(row.model for row in rows))
    return sorted(rows, key=lambda row: (models.index(row.model), kinds.index(row.kind), row.share or 0))
