"""Many lines at once, feature by feature: what a batch gains from computing several lines together, fetching ahead,
computing first what is there, and from the planner's number of lines; beside stock llama.cpp with all in memory.

In every round each column answers the same lines, others than in any other round, in a fresh process with an empty page
cache. pyengine's columns have the same memory, by control group: the budget + the model's other weights + the allowance
of `pyengine bench` + a KV cache for --most lines, which all of them open. Stock runs through the same Scheduler with
the planner's number of lines and chunk, so that it computes the same steps, and has no limit. A column that takes
longer than --minutes is cut: its speed is that of what it had generated until then.

Time counts from the first line's submission, with planning, without loading. Writes one CSV line per sample as it
comes; prints medians and ratios. Columns that compute the same steps must have the same tokens (same_must); others may
differ where kernels sum up in another order, as they do in stock llama.cpp.

    .venv/bin/python bench/batch_ablation.py [--model FILE] [--budget 25%] [--lines 32] [--prompt-tokens 32]
        [--answer-tokens 48] [--n 8] [--most 32] [--rounds 3] [--minutes 1.4] [--disk 200M] [--columns one-by-one ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batch_worker import Task
from cold_runs import Cold, ColdRuns, ratio, settings_of
from common import write_csv

from pyengine.bench.rows import LRU_BUNDLE, plan_rows
from pyengine.llama import default_threads
from pyengine.planning.shape import read_shape

ONE, MULTI, PREFETCH, REORDER = "one-by-one", "multi-batch", "hot-prefetch", "reorder"
PLANNED, STOCK = "planner", "stock-resident"
FIGURES = (
    *("status", "reason", "n", "prompt_chunk", "finished", "generated", "seconds", "tok_per_s", "load_s", "plan_s"),
    *("first_token_s", "steps", "hit_rate", "mb_per_token", "disk_mb_per_token", "stall_share", "step_lines"),
    *("planned_step_s", "actual_step_s", "same", "same_of", "same_as", "same_must", "limit_mb", "peak_mb", "other_cpu"),
)


@dataclass(frozen=True)
class Column:
    """A way to answer the lines. lines: at once; 0: --n, None: the planner's number. rules: see set_prefetch_rules."""

    policy: str = "auto"
    look_ahead: str = "auto"
    rules: Mapping[str, bool] = field(default_factory=dict)
    lines: int | None = 0
    stock: bool = False


#: In the order in which a round runs them: the planner's number must be known before stock's turn. ONE and MULTI
#: wait for all experts of a layer, which reorder = False says; nothing is fetched ahead that could be preempted.
COLUMNS: dict[str, Column] = {
    PLANNED: Column(lines=None),
    STOCK: Column(lines=None, stock=True),
    ONE: Column("lru", "off", {"preempt": False, "reorder": False}, lines=1),
    MULTI: Column("lru", "off", {"preempt": False, "reorder": False}),
    PREFETCH: Column(rules={"reorder": False}),
    REORDER: Column(),
}
#: In the papers' order: each has what the one before has, and one thing more.
SHOWN = (ONE, MULTI, PREFETCH, REORDER, PLANNED, STOCK)
#: Whose tokens are compared with whose. Of the first two it is known that they compute the same steps.
COMPARED = {PREFETCH: MULTI, REORDER: MULTI, PLANNED: STOCK, ONE: MULTI}
MUST = (PREFETCH, REORDER)


def main() -> None:
    arguments = parsed()
    cold = ColdRuns(arguments.model, arguments.disk)
    share = float(arguments.budget.removesuffix("%"))
    row = plan_rows(cold.facts, [LRU_BUNDLE], [share])[0]
    base = Task(
        model=str(cold.model),
        stock=False,
        n=arguments.n,
        prompt_chunk=None,
        most=arguments.most,
        budget=row.budget,
        bundle=str(cold.bundle) if cold.bundle else "off",
        policy="auto",
        look_ahead="auto",
        rules={},
        n_lines=arguments.lines,
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
        seed=0,
        seconds=60 * arguments.minutes,
        n_threads=arguments.threads or default_threads(),
        bytes_per_s=cold.bytes_per_s,
    )
    limit = (row.limit or 0) + base.n_ctx * read_shape(cold.model).kv_bytes_per_token
    print(f"memory of pyengine's columns: {limit / 1e6:.0f} MB, {row.budget / 1e6:.0f} MB of it slots", flush=True)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        samples: dict[str, dict[str, Any]] = {}
        for name in (name for name in COLUMNS if name in arguments.columns):
            task = task_of(base, COLUMNS[name], arguments.n, samples.get(PLANNED), arguments.seed + number)
            memory = None if task.stock else limit
            one = sample(cold.run("batch_worker", asdict(task), memory, task.seconds))
            one |= {"round": number, "column": name, "limit_mb": "" if memory is None else f"{memory / 1e6:.0f}"}
            print(f"round {number}, {name}: {described(one)}", flush=True)
            samples[name] = one
            rows.append(one)
            compare(samples)
            save(arguments, rows)
    tell(rows)
    wrong = [one for one in rows if one.get("same_must") == "yes" and one["same"] != one["same_of"]]
    if wrong:
        sys.exit(f"{len(wrong)} samples have other tokens than a column that computes the same steps")


def task_of(base: Task, column: Column, n: int, planned: Mapping[str, Any] | None, seed: int) -> Task:
    """What a column's process is to do; `planned`: what the planner's column gave, if it was run."""
    lines: int | None = n if column.lines == 0 else column.lines
    chunk = None
    if column.stock:  # the planner's batch, else the fixed one
        found = planned if planned and planned.get("n") else {"n": n, "prompt_chunk": None}
        lines, chunk = found["n"], found["prompt_chunk"]
    return replace(
        base,
        stock=column.stock,
        n=lines,
        prompt_chunk=chunk,
        policy=column.policy,
        look_ahead=column.look_ahead,
        rules=dict(column.rules),
        seed=seed,
    )


def sample(cold: Cold) -> dict[str, Any]:
    """The figures of a process, under the CSV's names, and its answers."""
    outcome, found = cold.outcome, cold.result
    general = {
        "status": "cut" if found.get("cut") else outcome.status,
        "reason": outcome.reason,
        "peak_mb": "" if outcome.memory.peak is None else f"{outcome.memory.peak / 1e6:.0f}",
        "other_cpu": f"{cold.other_cpu:.2f}",
    }
    if not found:
        return general
    counts, generated = found["counts"], max(1, found["generated"])
    accesses = counts["hits"] + counts["misses"]
    names = ("n", "prompt_chunk", "finished", "generated", "steps", "step_lines", "tokens")
    times = ("seconds", "load_s", "plan_s", "first_token_s", "planned_step_s", "actual_step_s")
    return {
        **general,
        **{name: found[name] for name in names},
        **{name: None if found[name] is None else round(found[name], 4) for name in times},
        "tok_per_s": round(found["generated"] / found["seconds"], 4),
        "hit_rate": round(counts["hits"] / accesses, 4) if accesses else None,
        "mb_per_token": round(counts["bytes_read"] / 1e6 / generated, 2),
        "disk_mb_per_token": round(counts.get("disk_bytes", 0) / 1e6 / generated, 2),
        "stall_share": round(counts["stall_seconds"] / found["seconds"], 4),
        "libraries": found["libraries"],
    }


def compare(samples: Mapping[str, dict[str, Any]]) -> None:
    """Of the lines that two columns have finished, how many have the same tokens."""
    for name, other in COMPARED.items():
        mine, theirs = (samples.get(one, {}).get("tokens") for one in (name, other))
        if mine is None or theirs is None:
            continue
        both = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
        samples[name].update(same=sum(a == b for a, b in both), same_of=len(both), same_as=other)
        samples[name]["same_must"] = "yes" if name in MUST else ""
    stock = samples.get(STOCK, {})
    if stock.get("libraries"):
        sys.exit(f"the stock column has loaded {stock['libraries']}; its figures would not be stock's")


def described(one: Mapping[str, Any]) -> str:
    if "tok_per_s" not in one:
        return f"{one['status']} ({one['reason']})"
    step = ""
    if one["planned_step_s"] is not None:
        actual = "-" if one["actual_step_s"] is None else f"{one['actual_step_s']:.3f} s"
        step = f", step planned {one['planned_step_s']:.3f} s, actual {actual}"
    hits = "" if one["hit_rate"] is None else f", hits {one['hit_rate']:.0%}"
    return (
        f"{one['tok_per_s']:.2f} tok/s, {one['n']} at once, {one['finished']} lines in {one['seconds']:.0f} s "
        f"({one['status']}){hits}{step}"
    )


def save(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """All lines so far: what a later Ctrl-C ends is kept."""
    header = ("round", "column", *FIGURES)
    lines = [["" if one.get(name) is None else one[name] for name in header] for one in rows]
    write_csv(arguments.csv, (*header, *settings_of(arguments)), lines)


def tell(rows: Sequence[Mapping[str, Any]]) -> None:
    speeds: dict[str, dict[int, float]] = {name: {} for name in SHOWN}
    for one in rows:
        if one.get("tok_per_s"):
            speeds[one["column"]][one["round"]] = one["tok_per_s"]
    for name, found in speeds.items():
        if found:
            print(f"{name}: {statistics.median(found.values()):.2f} tok/s")
    for name, to in (*((name, ONE) for name in SHOWN[1:]), (PLANNED, STOCK), (REORDER, STOCK)):
        if speeds[name].keys() & speeds[to].keys():
            print(ratio(f"{name} / {to}", speeds[name], speeds[to]))
    errors = [
        one["planned_step_s"] / one["actual_step_s"] - 1
        for one in rows
        if one.get("planned_step_s") and one.get("actual_step_s")
    ]
    if errors:
        print(f"planned step against actual: {', '.join(f'{error:+.0%}' for error in errors)}")
    compared = [one for one in rows if one.get("same_of")]
    for name in COMPARED:
        mine = [one for one in compared if one["column"] == name]
        if mine:
            same, of = (sum(one[each] for one in mine) for each in ("same", "same_of"))
            print(f"{name}: {same} of {of} answers as {COMPARED[name]}" + (", must be all" if name in MUST else ""))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: the bundled model")
    parser.add_argument("--budget", default="25%", help="percent of all experts")
    parser.add_argument("--lines", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=48, help="the model's end token is ignored")
    parser.add_argument("--n", type=int, default=8, help="lines at once where they are fixed")
    parser.add_argument("--most", type=int, default=32, help="lines at once that the planner may choose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1.4, help="of a column in a round, at most")
    parser.add_argument("--disk", default=None, metavar="200M", help="bytes that may be read per second (as root)")
    parser.add_argument(
        "--columns", nargs="+", choices=SHOWN, default=list(SHOWN), metavar="NAME", help=", ".join(SHOWN)
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's lines")
    parser.add_argument("--csv", default="batch_ablation.csv", help="in bench/results")
    arguments = parser.parse_args()
    if not 1 <= arguments.n <= arguments.most or arguments.lines < 1 or arguments.answer_tokens < 1:
        parser.error("at least one line and one token; --n at most --most")
    return arguments


if __name__ == "__main__":
    main()
