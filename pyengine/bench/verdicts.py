"""Who won a contest's cells: ratios of turns of the same round, with their interval. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyengine.bench.cells import Cell
from pyengine.bench.rows import AUTO, AUTO_MEMORY, OURS, STOCK_RESIDENT
from pyengine.bench.samples import Sample

#: What auto's ratio must not be below of the best baseline's speed, all of its interval.
NEVER_BELOW = 0.97

#: Pairs without which nothing is said.
LEAST_PAIRS = 3

#: Student's t for a two-sided 95 % interval, by degrees of freedom (from 1).
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_T_BEYOND = 1.96


@dataclass(frozen=True)
class PairedRatio:
    """Our speed over a baseline's. middle: geometric mean over the rounds in which both played; low, high: its 95 %
    interval by Student's t on logarithms, None with a single pair."""

    middle: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class Verdict:
    """One cell.

    Attributes:
        speeds: kind -> median tokens/s; those that gave no token are not in it.
        lost: kind -> what became of it, of those that never gave a token or were ended.
        judged: which of ours: auto-memory where it played, else auto.
        ratios: baseline -> the judged one's speed over its.
        best: the fastest baseline by median, "" if none gave a token.
        of_share: auto's speed, with its share of experts, over the best one's, where auto is not the judged one.
        kept: share of experts that auto-memory found room for, percent; None where it did not play.
        word: "holds": the interval is not below NEVER_BELOW; "LOSS": all of it is below; "open": neither, or fewer
            pairs against the best than LEAST_PAIRS.
        exact: False if some turn of pyengine's gave other tokens.
    """

    cell: Cell
    speeds: Mapping[str, float]
    lost: Mapping[str, str]
    judged: str
    ratios: Mapping[str, PairedRatio]
    best: str
    of_share: PairedRatio | None
    kept: float | None
    word: str
    exact: bool


def paired(ours: Sequence[Sample], theirs: Sequence[Sample]) -> PairedRatio | None:
    """None without a round in which both gave tokens."""
    other = {sample.round: sample.decode_tok_per_s for sample in theirs}
    logs = [
        math.log(sample.decode_tok_per_s / speed)
        for sample in ours
        if sample.decode_tok_per_s and (speed := other.get(sample.round))
    ]
    if not logs:
        return None
    middle = statistics.fmean(logs)
    if len(logs) == 1:
        return PairedRatio(math.exp(middle), None, None, 1)
    t = _T[len(logs) - 2] if len(logs) - 2 < len(_T) else _T_BEYOND
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return PairedRatio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs))


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """One for each cell, in the order in which they were first played."""
    cells: dict[Cell, list[Sample]] = {}
    for sample in samples:
        if sample.kind != STOCK_RESIDENT:
            cells.setdefault(Cell.of(sample), []).append(sample)
    return [_verdict(cell, mine) for cell, mine in cells.items()]


def _verdict(cell: Cell, samples: Sequence[Sample]) -> Verdict:
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    speeds = {}
    for kind, mine in by_kind.items():
        found = [sample.decode_tok_per_s for sample in mine if sample.decode_tok_per_s]
        if found:
            speeds[kind] = statistics.median(found)
    judged = AUTO_MEMORY if AUTO_MEMORY in by_kind else AUTO
    ours = by_kind.get(judged, [])
    ratios = {}
    for kind in by_kind:
        ratio = paired(ours, by_kind[kind]) if kind not in OURS else None
        if ratio is not None:
            ratios[kind] = ratio
    best = max((kind for kind in speeds if kind not in OURS), key=speeds.__getitem__, default="")
    shared = by_kind.get(AUTO, [])
    return Verdict(
        cell=cell,
        speeds=speeds,
        lost={sample.kind: sample.status for sample in samples if sample.status != "ok"},
        judged=judged,
        ratios=ratios,
        best=best,
        of_share=paired(shared, by_kind.get(best, [])) if judged != AUTO else None,
        kept=_kept(by_kind.get(AUTO_MEMORY, []), shared),
        word=_word(ratios.get(best)),
        exact=all(sample.exact != "no" for sample in samples),
    )


def _kept(untold: Sequence[Sample], shared: Sequence[Sample]) -> float | None:
    """From what auto's share is in bytes."""
    mine = next((s for s in untold if s.status == "ok"), None)
    its = next((s for s in shared if s.status == "ok" and s.share), None)
    if mine is None or its is None or its.share is None or not its.budget_bytes:
        return None
    return its.share * mine.budget_bytes / its.budget_bytes


def _word(ratio: PairedRatio | None) -> str:
    if ratio is None or ratio.low is None or ratio.high is None or ratio.pairs < LEAST_PAIRS:
        return "open"
    if ratio.low >= NEVER_BELOW:
        return "holds"
    return "LOSS" if ratio.high < NEVER_BELOW else "open"
