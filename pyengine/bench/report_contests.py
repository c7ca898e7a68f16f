"""The report page's tables of experiments: auto against the best baseline, and against the papers' systems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from pyengine.bench.bounds import LeastTime, least_time
from pyengine.bench.cells import Cell
from pyengine.bench.report_tables import markdown
from pyengine.bench.results import Run
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
from pyengine.bench.verdicts import LEAST_PAIRS, NEVER_BELOW, PairedRatio, Verdict, verdicts

_TURNS = """\
The ways to run a model are loaded at the same time, each in a process and a memory control group of its own (budget +
other weights + 400 MB; the memory-mapped ones and auto-memory: no more than auto took at its peak with its share of
experts), and take turns at decoding the same text: A B C, C B A and so on, the same number of tokens each. The disk
limit is set on the running processes. Ratios are geometric means over pairs of the same round, with a 95 % interval by
Student's t on their logarithms.
"""

#: Experiment -> heading and what was done.
INTRODUCTIONS = {
    "never-slower": (
        "Never slower",
        f"{_TURNS}A cell is a limit on memory: what a process with that share of experts takes. Judged is "
        "`auto-memory`, which has that much memory and is told nothing else; baselines have that share, or that "
        "memory. `auto` with the share itself stands beside it. A baseline with less than half of the best one's speed "
        "has one turn, one with less than two thirds, and never as fast, has two. `holds`: the whole interval of the "
        f"ratio to the best baseline is at least {NEVER_BELOW}; `LOSS`: all of it is below; `open`: neither, or fewer "
        f"than {LEAST_PAIRS} pairs.\n",
    ),
    "papers": (
        "The papers' systems inside this engine",
        f"{_TURNS}R is the time to move an expert over the time to compute a layer (stock-resident's time per token / "
        "layers); the disk limit makes it. Baselines have our reads, kernels and bundle; load-on-demand reads the GGUF "
        "file. The ceiling is what no scheme can exceed in a cell: the baseline's time per token / max(T, B e / b), "
        "with T the time of stock-resident, B the misses per token of Belady, who knows what comes, with the same "
        "slots and texts, e the bytes of an expert and b the bandwidth. A claim above it is out of reach there.\n",
    ),
}

#: What the papers claim of systems like auto: baseline -> (ratio of decoding speeds, who).
_CLAIMS = {
    ON_DEMAND: (4.1, "Fate"),
    ACTIVATION_PATH: (2.2, "Fate"),
    LRU_BUNDLE: (2.84, "ProMoE"),
}


#: Whose claims, on which machines, which R that is here, and what the claim is. None prints an R (a layer of compute
#: hides about as much as one transfer on the faster links), and no budget here is theirs: every one is shown.
_SETTINGS = (
    ("Fate, arXiv 2502.12224", "RTX 3090, 16 GB/s", "0.7 to 1", "largest found, against load-on-demand and EAP"),
    ("Fate, arXiv 2502.12224", "GTX 1080 Ti, 4 GB/s", "4", "the same"),
    ("ProMoE, arXiv 2410.22134", "RTX 4090, PCIe 4", "0.7 to 1", "headline of its first version"),
)


def contests(run: Run) -> Iterator[str]:
    """The tables of a run of experiments.py."""
    found = verdicts(run.samples)
    yield from _papers(found, run) if run.record["experiment"] == "papers" else _never_slower(found)
    wrong = [verdict for verdict in found if not verdict.exact]
    if wrong:
        yield "**Other tokens** in: " + "; ".join(" ".join(_names(verdict.cell)) for verdict in wrong) + "\n"


def _never_slower(found: Sequence[Verdict]) -> Iterator[str]:
    words = [verdict.word for verdict in found]
    judged = [ratio for verdict in found if (ratio := verdict.ratios.get(verdict.best)) is not None]
    smallest = f" The smallest ratio is {min(ratio.middle for ratio in judged):.2f}." if judged else ""
    yield (
        f"**Of {len(found)} cells {words.count('holds')} hold, {words.count('open')} are open, "
        f"{words.count('LOSS')} are lost.**{smallest}\n"
    )
    kinds = (AUTO_MEMORY, AUTO, LRU_BUNDLE, ON_DEMAND, STOCK_MMAP_PLAIN, STOCK_MMAP)
    head = ["model", "memory of", "disk", "it keeps", *kinds, "ratio to best", "95 %", "pairs", "verdict"]
    lines = []
    for verdict in found:
        ratio = verdict.ratios.get(verdict.best)
        word = f"**{verdict.word}**" if verdict.word == "LOSS" else verdict.word
        kept = "" if verdict.kept is None else f"{verdict.kept:.0f} %"
        lines.append([*_names(verdict.cell), kept, *(_speed(verdict, kind) for kind in kinds), *_cells(ratio), word])
    yield markdown(
        [*head, "auto with the share / best"], [[*line, _share(v)] for line, v in zip(lines, found, strict=True)]
    )


def _share(verdict: Verdict) -> str:
    """Auto with its share against the best, beside the one that is judged."""
    if verdict.of_share is None:
        return ""
    middle, interval, _ = _cells(verdict.of_share)
    return f"{middle} ({interval})" if interval else middle


def _papers(found: Sequence[Verdict], run: Run) -> Iterator[str]:
    kinds = (AUTO, *_CLAIMS)
    head = ["model", "budget", "R", *(f"{kind} tok/s" for kind in kinds), "any scheme, at most tok/s"]
    head += [f"auto / {kind} (claim {claim:g}, {who})" for kind, (claim, who) in _CLAIMS.items()]
    found = sorted(found, key=lambda v: (v.cell.model, v.cell.share or 0, v.cell.ratio or 0))
    least = {verdict.cell: _least_time(verdict.cell, run) for verdict in found}
    lines = []
    for verdict in found:
        bound = least[verdict.cell]
        lines.append(
            [
                *_names(verdict.cell),
                *(_speed(verdict, kind) for kind in kinds),
                "" if bound is None else f"{1 / bound.seconds:.3g}",
                *(_claimed(verdict, kind, bound) for kind in _CLAIMS),
            ]
        )
    yield markdown(["paper", "machine", "R here", "its claim"], _SETTINGS)
    yield markdown(head, lines)
    for kind, (claim, who) in _CLAIMS.items():
        mine = [verdict for verdict in found if kind in verdict.ratios]
        ratios = [verdict.ratios[kind].middle for verdict in mine]
        if not ratios:
            continue
        ceilings = [b.ceiling(v.speeds[kind]) for v in mine if (b := least[v.cell]) is not None and kind in v.speeds]
        beyond = sum(ceiling < claim for ceiling in ceilings)
        yield (
            f"Against {kind}: {min(ratios):.2f} to {max(ratios):.2f}; {who}'s {claim:g} is reached in "
            f"{sum(ratio >= claim for ratio in ratios)} of {len(ratios)} cells, and in "
            f"{sum(ratio < 1 for ratio in ratios)} auto is slower."
            + (f" It is out of reach for any scheme in {beyond} of {len(ceilings)} cells." if ceilings else "")
            + "\n"
        )
    reached = [v.speeds[AUTO] * b.seconds for v in found if (b := least[v.cell]) is not None and AUTO in v.speeds]
    if reached:
        yield f"Auto decodes at {min(reached):.0%} to {max(reached):.0%} of what any scheme could.\n"


def _least_time(cell: Cell, run: Run) -> LeastTime | None:
    mine = [sample for sample in run.samples if sample.kind != STOCK_RESIDENT and Cell.of(sample) == cell]
    return least_time(mine, run.samples, run.record)


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


def _claimed(verdict: Verdict, kind: str, bound: LeastTime | None) -> str:
    ratio, claim = verdict.ratios.get(kind), _CLAIMS[kind][0]
    if ratio is None:
        return ""
    middle, interval, _ = _cells(ratio)
    word = f"**{middle}**" if ratio.middle >= claim else f"{middle} LOSS" if ratio.middle < 1 else middle
    text = f"{word} ({interval})" if interval else word
    if bound is None or kind not in verdict.speeds:
        return text
    ceiling = bound.ceiling(verdict.speeds[kind])
    return f"{text}, ceiling {ceiling:.2f}{': out of reach' if ceiling < claim else ''}"
