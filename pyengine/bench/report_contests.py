"""The report page's tables of experiments: auto against the best baseline, and against the papers' systems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from pyengine.bench.cells import Cell
from pyengine.bench.report_tables import markdown
from pyengine.bench.results import Run
from pyengine.bench.rows import (
    ACTIVATION_PATH,
    AUTO,
    LRU_BUNDLE,
    ON_DEMAND,
    STOCK_MMAP,
    STOCK_MMAP_PLAIN,
)
from pyengine.bench.verdicts import NEVER_BELOW, PairedRatio, Verdict, verdicts

_TURNS = """\
The ways to run a model are loaded at the same time, each in a process and a memory control group of its own (budget +
other weights + 400 MB; the memory-mapped ones: no more than auto took at its peak), and take turns at decoding the same
text: A B C, C B A and so on, the same number of tokens each. The disk limit is set on the running processes. Ratios are
geometric means over pairs of the same round, with a 95 % interval by Student's t on their logarithms.
"""

#: Experiment -> heading and what was done.
INTRODUCTIONS = {
    "never-slower": (
        "Never slower",
        f"{_TURNS}A baseline with less than half of the best one's speed has one turn. `holds`: the whole interval of "
        f"auto / best baseline is at least {NEVER_BELOW}; `LOSS`: all of it is below; `open`: neither.\n",
    ),
    "papers": (
        "The papers' systems inside this engine",
        f"{_TURNS}R is the time to move an expert over the time to compute a layer (stock-resident's time per token / "
        "layers); the disk limit makes it. Baselines have our reads, kernels and bundle; load-on-demand reads the GGUF "
        "file.\n",
    ),
}

#: What the papers claim of systems like auto: baseline -> (ratio of decoding speeds, who).
_CLAIMS = {
    ON_DEMAND: (4.1, "Fate"),
    ACTIVATION_PATH: (2.2, "Fate"),
    LRU_BUNDLE: (2.84, "ProMoE"),
}


def contests(run: Run) -> Iterator[str]:
    """The tables of a run of experiments.py."""
    found = verdicts(run.samples)
    yield from _papers(found) if run.record["experiment"] == "papers" else _never_slower(found)
    wrong = [verdict for verdict in found if not verdict.exact]
    if wrong:
        yield "**Other tokens** in: " + "; ".join(" ".join(_names(verdict.cell)) for verdict in wrong) + "\n"


def _never_slower(found: Sequence[Verdict]) -> Iterator[str]:
    kinds = (AUTO, LRU_BUNDLE, ON_DEMAND, STOCK_MMAP_PLAIN, STOCK_MMAP)
    head = ["model", "budget", "disk", *kinds, "auto / best", "95 %", "pairs", "verdict"]
    lines = []
    for verdict in found:
        ratio = verdict.ratios.get(verdict.best)
        word = f"**{verdict.word}**" if verdict.word == "LOSS" else verdict.word
        lines.append([*_names(verdict.cell), *(_speed(verdict, kind) for kind in kinds), *_cells(ratio), word])
    yield markdown(head, lines)
    words = [verdict.word for verdict in found]
    judged = [ratio for verdict in found if (ratio := verdict.ratios.get(verdict.best)) is not None]
    if judged:
        yield (
            f"Of {len(found)} cells {words.count('holds')} hold, {words.count('LOSS')} are lost, "
            f"{len(found) - words.count('holds') - words.count('LOSS')} are open. The smallest ratio is "
            f"{min(ratio.middle for ratio in judged):.2f}.\n"
        )


def _papers(found: Sequence[Verdict]) -> Iterator[str]:
    kinds = (AUTO, *_CLAIMS)
    head = ["model", "budget", "R", *(f"{kind} tok/s" for kind in kinds)]
    head += [f"auto / {kind} (claim {claim:g}, {who})" for kind, (claim, who) in _CLAIMS.items()]
    lines = []
    for verdict in sorted(found, key=lambda v: (v.cell.model, v.cell.share or 0, v.cell.ratio or 0)):
        lines.append(
            [
                *_names(verdict.cell),
                *(_speed(verdict, kind) for kind in kinds),
                *(_claimed(verdict.ratios.get(kind), claim) for kind, (claim, _) in _CLAIMS.items()),
            ]
        )
    yield markdown(head, lines)
    for kind, (claim, who) in _CLAIMS.items():
        ratios = [verdict.ratios[kind].middle for verdict in found if kind in verdict.ratios]
        if ratios:
            yield (
                f"Against {kind}: {min(ratios):.2f} to {max(ratios):.2f}; {who}'s {claim:g} is reached in "
                f"{sum(ratio >= claim for ratio in ratios)} of {len(ratios)} cells, and in "
                f"{sum(ratio < 1 for ratio in ratios)} auto is slower.\n"
            )


def _names(cell: Cell) -> list[str]:
    disk = f"{cell.ratio:g}" if cell.ratio is not None else f"{cell.limit:g} MB/s" if cell.limit else "bare"
    return [PurePath(cell.model).stem, f"{cell.share:g} %", disk]


def _speed(verdict: Verdict, kind: str) -> str:
    if kind in verdict.speeds:
        return f"{verdict.speeds[kind]:.3g}"
    return verdict.lost.get(kind, "")


def _cells(ratio: PairedRatio | None) -> list[str]:
    if ratio is None:
        return ["", "", "0"]
    interval = f"{ratio.low:.2f} .. {ratio.high:.2f}" if ratio.low is not None and ratio.high is not None else ""
    return [f"{ratio.middle:.2f}", interval, str(ratio.pairs)]


def _claimed(ratio: PairedRatio | None, claim: float) -> str:
    if ratio is None:
        return ""
    middle, interval, _ = _cells(ratio)
    word = f"**{middle}**" if ratio.middle >= claim else f"{middle} LOSS" if ratio.middle < 1 else middle
    return f"{word} ({interval})" if interval else word
