"""Prompts of several lengths from a cold start: stock llama.cpp with all in memory and memory-mapped; pyengine as it
comes, as a reactive LRU cache, and loading every expert on demand.

`pyengine bench` measures prefill after a first prompt and its answer, and to its end; here each row is a fresh process
with an empty page cache and no expert in memory, and what takes longer than --seconds is cut. The rows, and their
memory limits by control group, are those of `pyengine bench` (its --rows help); the memory-mapped one gets the limit of
each budget; --more adds to all of them. A prompt is computed a micro-batch at a time, and the clock is looked at after
each: so the shorter lengths are beginnings of the longest. --separate computes each length in a process of its own.

Time counts from the prompt's beginning, without loading. Writes one CSV line per micro-batch (tokens and seconds so
far); prints seconds, and ratios at each length, or at the most tokens that both rows had done.

    .venv/bin/python bench/prompt_lengths.py [--model FILE] [--lengths 512,2048,8192] [--budgets 50,25] [--rounds 3]
        [--seconds 60] [--separate] [--rows stock-resident,stock-mmap-plain,on-demand,lru-bundle,auto] [--disk 200M]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cold_runs import Cold, ColdRuns, ratio, settings_of
from common import write_csv

from pyengine.bench.child import Task
from pyengine.bench.rows import (
    AUTO,
    BUNDLED,
    LRU_BUNDLE,
    MMAP_KINDS,
    ON_DEMAND,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
    ModelFacts,
    Row,
    plan_rows,
)
from pyengine.llama import default_threads

KINDS = (STOCK_RESIDENT, STOCK_MMAP_PLAIN, ON_DEMAND, LRU_BUNDLE, AUTO)
HEADER = (
    *("round", "row", "share", "asked", "status", "reason", "tokens", "seconds", "tok_per_s", "next", "same_next"),
    *("hit_rate", "mb_per_token", "disk_mb_per_token", "load_s", "limit_mb", "peak_mb", "other_cpu"),
)


@dataclass
class Curve:
    """Seconds by tokens that were done then, of one row in each round."""

    kind: str
    share: float | None
    rounds: dict[int, dict[int, float]]

    @property
    def name(self) -> str:
        return self.kind if self.share is None else f"{self.kind} {self.share:g}%"


def main() -> None:
    arguments = parsed()
    lengths = sorted({int(part) for part in arguments.lengths.split(",")})
    shares = [float(part.removesuffix("%")) for part in arguments.budgets.split(",")]
    cold = ColdRuns(arguments.model, arguments.disk)
    rows = [
        row if row.limit is None else replace(row, limit=row.limit + arguments.more * 10**6)
        for row in rows_of(cold.facts, arguments.rows.split(","), shares)
    ]
    curves = {row: Curve(row.kind, row.share, {}) for row in rows}
    jobs = [[length] for length in lengths] if arguments.separate else [lengths]
    lines: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for job in jobs:
            known: dict[int, int] = {}  # the next tokens that the round's first row gave
            for row in rows:
                task = task_of(cold, row, max(job), arguments)
                given = {"task": asdict(task), "lengths": job, "seed": arguments.seed + number}
                found = cold.run("prompt_worker", given, row.limit, arguments.seconds)
                if row.stock and found.result.get("libraries"):
                    sys.exit(f"a stock row has loaded {found.result['libraries']}; its figures would not be stock's")
                lines += lines_of(found, row, number, max(job), known)
                for mark in found.result.get("marks", ()):
                    # Of separate processes the one for that length has its say first.
                    curves[row].rounds.setdefault(number, {}).setdefault(mark["tokens"], mark["seconds"])
                print(f"round {number}, {curves[row].name}: {described(found)}", flush=True)
                save(arguments, lines)
    tell(list(curves.values()), lengths)


def rows_of(facts: ModelFacts, kinds: Sequence[str], shares: Sequence[float]) -> Iterator[Row]:
    """As plan_rows() has them, but memory-mapped rows at every share."""
    for row in plan_rows(facts, kinds, shares):
        if row.kind not in MMAP_KINDS:
            yield row
            continue
        for share in shares:
            limit = plan_rows(facts, [row.kind], (), share)[0].limit
            yield Row(row.kind, share, 0, limit)


def task_of(cold: ColdRuns, row: Row, n_tokens: int, arguments: argparse.Namespace) -> Task:
    return Task(
        model=str(cold.model),
        kind=row.kind,
        budget=row.budget,
        bundle=str(cold.bundle) if row.kind in BUNDLED and cold.bundle else "off",
        n_tokens=0,
        n_prompts=0,
        prefill_tokens=n_tokens,
        limit_s=arguments.seconds,
        n_threads=arguments.threads or default_threads(),
    )


def lines_of(cold: Cold, row: Row, number: int, asked: int, known: dict[int, int]) -> Iterator[dict[str, Any]]:
    """A line of the CSV for each micro-batch; one in all if there is none."""
    outcome, found = cold.outcome, cold.result
    general = {
        "round": number,
        "row": row.kind,
        "share": row.share,
        "asked": asked,
        "status": "cut" if found.get("cut") else outcome.status,
        "reason": outcome.reason,
        "limit_mb": None if row.limit is None else f"{row.limit / 1e6:.0f}",
        "peak_mb": None if outcome.memory.peak is None else f"{outcome.memory.peak / 1e6:.0f}",
        "other_cpu": f"{cold.other_cpu:.2f}",
    }
    if not found:
        yield general
    for mark in found.get("marks", ()):
        counts, tokens = mark["counts"], mark["tokens"]
        accesses = counts.get("hits", 0) + counts.get("misses", 0)
        yield general | {
            "tokens": tokens,
            "seconds": f"{mark['seconds']:.4f}",
            "tok_per_s": f"{tokens / mark['seconds']:.3f}",
            "next": mark["next"],
            "same_next": "yes" if known.setdefault(tokens, mark["next"]) == mark["next"] else "no",
            "hit_rate": f"{counts['hits'] / accesses:.4f}" if accesses else None,
            "mb_per_token": f"{counts['bytes_read'] / 1e6 / tokens:.3f}" if "bytes_read" in counts else None,
            "disk_mb_per_token": f"{counts['disk_bytes'] / 1e6 / tokens:.3f}" if "disk_bytes" in counts else None,
            "load_s": f"{found['load_s']:.3f}",
        }


def described(cold: Cold) -> str:
    marks = cold.result.get("marks")
    if not marks:
        return f"{cold.outcome.status} ({cold.outcome.reason})"
    last = marks[-1]
    cut = ", cut" if cold.result["cut"] else ""
    return (
        f"{last['tokens']} tokens in {last['seconds']:.1f} s{cut}, {last['tokens'] / last['seconds']:.1f} tok/s "
        f"(the first {marks[0]['tokens']}: {marks[0]['tokens'] / marks[0]['seconds']:.1f}), "
        f"{last['counts'].get('disk_bytes', 0) / 1e6:.0f} MB from disk"
    )


def save(arguments: argparse.Namespace, lines: Sequence[Mapping[str, Any]]) -> None:
    """All lines so far: what a later Ctrl-C ends is kept."""
    written = [["" if line.get(name) is None else line[name] for name in HEADER] for line in lines]
    write_csv(arguments.csv, (*HEADER, *settings_of(arguments)), written)


def tell(curves: Sequence[Curve], lengths: Sequence[int]) -> None:
    ours = [curve for curve in curves if curve.kind == AUTO]
    for length in lengths:
        for curve in curves:
            seconds = [marks[length] for marks in curve.rounds.values() if length in marks]
            if seconds:
                middle = statistics.median(seconds)
                print(f"{length} tokens, {curve.name}: {middle:.2f} s, {length / middle:.1f} tok/s")
        for mine in ours:
            for other in curves:
                if other.kind != AUTO and other.share in (None, mine.share):
                    print(f"{length} tokens, {compared(mine, other, length)}")


def compared(mine: Curve, other: Curve, length: int) -> str:
    """How many times as fast, at the most tokens up to `length` that both have done in all rounds."""
    both = mine.rounds.keys() & other.rounds.keys()
    done = (set(mine.rounds[number]) & set(other.rounds[number]) for number in both)
    at = max((n for n in (set.intersection(*done) if both else ()) if n <= length), default=0)
    name = f"{mine.name} / {other.name}" + ("" if at == length else f" (of the first {at}, cut)")
    if not at:
        return f"{mine.name} / {other.name}: -"
    speeds = ({number: at / curve.rounds[number][at] for number in both} for curve in (mine, other))
    return ratio(name, *speeds)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: the bundled model")
    parser.add_argument("--lengths", default="512,2048,8192", help="tokens")
    parser.add_argument("--budgets", default="50,25", help="percent of all experts")
    parser.add_argument("--rows", default=",".join(KINDS), help="kinds of row of pyengine bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a prompt, at most, to the end of a micro-batch")
    parser.add_argument("--separate", action="store_true", help="a process for each length")
    parser.add_argument("--disk", default=None, metavar="200M", help="bytes that may be read per second (as root)")
    parser.add_argument(
        "--more", type=int, default=0, help="MB of memory beside that of pyengine bench, for a long context's KV cache"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's prompt")
    parser.add_argument("--csv", default="prompt_lengths.csv", help="in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
