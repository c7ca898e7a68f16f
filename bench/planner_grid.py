"""Does the planner foretell how long a step takes, and choose well? A grid of budgets, texts at once and disk limits.

For each limit on the disk and each budget a fresh process in a control group plans, and then runs n texts at once:
first the planner's n, then what it would choose next with costs that this run has corrected, then every n of --texts.
Each is one line of CSV with two predictions: with the costs as they were measured, before any step; and with those that
the first third of the cell's own steps has corrected. Both are compared with the other two thirds (medians); choices
with the best n of the sweep. Prints the errors, and how far the choices are from the best.

    .venv/bin/python bench/planner_grid.py [--model FILE] [--budgets 25 50 100] [--texts 1 2 4 8 16 32]
        [--disks 0 200 500] [--steps 30] [--trace FILE] [--advice fixed] [--append]

A disk limit of 0 MB/s is none; others need control groups (root). --advice auto lets policy and prefetching be what
they are unless told otherwise; fixed is "lfu" with nothing fetched ahead, which is all that is foretold before a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import PROMPTS, RESULTS

from pyengine.bench.cgroups import DiskLimit, block_device, groups, remove_leftovers
from pyengine.bench.launch import command_of
from pyengine.bench.quiet import CpuClock

PROMPT_TOKENS = 24
HEADER = (
    *("model", "disk_mb_per_s", "budget_percent", "advice", "texts", "actual_step_s", "planned_step_s", "error"),
    *("refined_step_s", "refined_error", "within_steps", "actual_missing", "planned_missing", "refined_missing"),
    *("actual_experts_s", "planned_experts_s", "actual_attention_s", "planned_attention_s", "actual_waiting_s"),
    *("planned_waiting_s", "actual_reading_s", "planned_reading_s", "actual_tok_per_s", "planned_tok_per_s"),
    *("hidden", "chosen", "chosen_next", "steps", "other_cpu", "stolen_cpu"),
)
#: Steps of a cell; the least, if it takes longer than CELL_S seconds; and when it is ended anyway.
STEPS, LEAST, CELL_S, LONGEST_S = 36, 15, 10.0, 150.0


@dataclass(frozen=True)
class Task:
    """What one process does: one budget on one disk, every number of texts."""

    model: str
    budget: int
    texts: list[int]
    n_steps: int
    bytes_per_s: int
    trace: str | None
    advice: str


def worker(task: Task) -> None:
    """Plan, run, print one line of JSON for each number of texts."""
    from pyengine import Llama
    from pyengine.planner.batch_plan import demand_of
    from pyengine.planner.refine import Refiner
    from pyengine.planner.solving import Memory, Work, solve
    from pyengine.planning.shape import read_shape

    shape = read_shape(Path(task.model))
    costs = costs_here(shape, task.bytes_per_s)
    demand, words = demand_of(shape, "lfu", Path(task.trace) if task.trace else None)
    print(f"routing: {words}", file=sys.stderr)
    memory, most = Memory(0, 0, 0, task.budget), max(task.texts)
    # What is measured is steps without a prompt, so these are what is chosen for.
    work = Work(0, 2 * PROMPT_TOKENS + task.n_steps)
    chosen = solve(costs, demand, shape, memory, work, most_sequences=most).n_sequences
    n_ctx = -(-most * (PROMPT_TOKENS + task.n_steps + 8) // 256) * 256
    advice = {"policy": "lfu", "look_ahead": "off"} if task.advice == "fixed" else {}
    llm = Llama(task.model, ram_budget=task.budget, n_ctx=n_ctx, n_sequences=most, n_batch=512, **advice)
    slots = shape.slots(task.budget)
    texts, chosen_next = [chosen], None
    while texts:
        n = texts.pop(0)
        corrected = Refiner(costs, demand, lambda: slots)
        line = cell(llm, task, n, costs, corrected)
        if chosen_next is None:
            chosen_next = solve(corrected.costs, demand, shape, memory, work, most_sequences=most).n_sequences
            texts = sorted({chosen_next, *task.texts} - {chosen})
        if line:
            line |= {"chosen": int(n == chosen), "chosen_next": int(n == chosen_next)}
            print(json.dumps(line), flush=True)
    llm.close()


def cell(llm: Any, task: Task, n: int, costs: Any, corrected: Any) -> dict[str, Any]:
    """n texts at once: what was foretold and what was. `corrected`, a fresh Refiner, sees all steps in the end."""
    from pyengine.planner.inequalities import inequalities, step_time

    before, ours = CpuClock.now(), sum(os.times()[:2])
    seen = steps_of(llm, task, n)
    other, stolen = CpuClock.now().others_since(before, sum(os.times()[:2]) - ours)
    third = len(seen) // 3
    if third < 5:  # too few for a correction
        return {}
    for one in seen[:third]:
        corrected.observe(one)
    refined, load, shape = corrected.costs, corrected.demand_of(seen[0]), corrected.shape_of(seen[0])
    for one in seen[third:]:
        corrected.observe(one)
    rest = seen[third:]
    shape = replace(shape, cells=statistics.median(one.cells for one in rest))
    planned, later = step_time(costs, shape, load), step_time(refined, shape, load)
    wall, kernels, stall, missing, reading = (
        statistics.median(getattr(one, name) for one in rest)
        for name in ("wall_s", "compute_s", "stall_s", "missing", "io_s")
    )
    return {
        "texts": n,
        "actual_step_s": wall,
        "planned_step_s": planned.total,
        "error": planned.total / wall - 1,
        "refined_step_s": later.total,
        "refined_error": later.total / wall - 1,
        "within_steps": statistics.mean(abs(later.total / one.wall_s - 1) <= 0.15 for one in rest),
        "actual_missing": missing / load.n_layer,
        "planned_missing": load.missing * costs.miss_factor,
        "refined_missing": load.missing * refined.miss_factor,
        "actual_experts_s": kernels,
        "planned_experts_s": planned.experts,
        "actual_attention_s": wall - kernels - stall,
        "planned_attention_s": planned.attention,
        "actual_waiting_s": stall,
        "planned_waiting_s": planned.waiting,
        "actual_reading_s": reading,
        "planned_reading_s": planned.reading,
        "actual_tok_per_s": n / wall,
        "planned_tok_per_s": n / planned.total,
        "hidden": int(all(one.holds for one in inequalities(costs, shape, load))),
        "steps": len(rest),
        "other_cpu": other,
        "stolen_cpu": stolen,
    }


class Seen:
    """Stands in the place of a Refiner: who is to know the steps is settled by cell()."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.begun = time.monotonic()

    def observe(self, record: Any) -> None:
        self.records.append(record)

    @property
    def enough(self) -> bool:
        n, seconds = len(self.records), time.monotonic() - self.begun
        return n >= STEPS or seconds > LONGEST_S or (seconds > CELL_S and n >= LEAST)


def steps_of(llm: Any, task: Task, n: int) -> list[Any]:
    """The steps in which all n texts decode and nothing else is computed."""
    from pyengine.planner.watching import StepWatch
    from pyengine.sessions import Request, SamplingParams, Scheduler, SessionState

    seen = Seen()
    watch = StepWatch(llm, seen, {(n, 0)})
    sampling = SamplingParams(max_tokens=task.n_steps, temperature=1.0, ignore_eos=True)
    begin = 0
    while not seen.enough:  # others each time
        texts = [PROMPTS[(begin + i) % len(PROMPTS)] for i in range(n)]
        prompts = [llm.tokenize(text.encode())[:PROMPT_TOKENS] for text in texts]
        begin += n
        with Scheduler(llm, max_sequences=n) as scheduler:
            sessions = [
                scheduler.submit(Request(tokens, replace(sampling, seed=begin + i))) for i, tokens in enumerate(prompts)
            ]
            while not scheduler.idle and not seen.enough:
                running = [one for one in sessions if not one.finished]
                decoding = sum(one.state is SessionState.DECODING for one in running)
                watch.next_step(decoding, None, float(sum(one.prompt_tokens + len(one.tokens) for one in running)))
                scheduler.step()
    watch.stop()
    return seen.records


def costs_here(shape: Any, bytes_per_s: int) -> Any:
    """Measured costs; those that are kept if there are any. A limit on the disk holds for measuring, too, but a probe's
    short reads may come within a limit's burst."""
    from pyengine.planner.batch_plan import known_costs, save_measured
    from pyengine.planner.measuring import measure_costs
    from pyengine.planning import probe

    costs = known_costs(shape)
    if costs is None or not costs.measured:
        costs = measure_costs(shape, probe.measure(shape))
        save_measured(shape, costs)
    return costs.with_bandwidth(bytes_per_s) if bytes_per_s else costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100], help="percent of all experts")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--disks", type=int, nargs="+", default=[0, 200, 500], help="MB/s, 0: no limit")
    parser.add_argument("--steps", type=int, default=30, help="tokens of each text")
    parser.add_argument("--trace", default=None)
    parser.add_argument("--advice", choices=("fixed", "auto"), default="fixed")
    parser.add_argument("--append", action="store_true", help="to the CSV of an earlier call")
    parser.add_argument("--out", default="planner_grid.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Task(**json.loads(arguments.worker)))
        return

    from pyengine.bundled import bundled_model
    from pyengine.bundles import candidates
    from pyengine.planning.probe import now_used_bundle
    from pyengine.planning.shape import read_shape

    model = Path(arguments.model or bundled_model())
    shape = read_shape(model)
    bundle = next((file for file in candidates(model) if file.is_file()), None) if now_used_bundle(model) else None
    where = bundle or model
    print(f"{model.name}, experts from {where.name}")
    print(costs_here(shape, 0))  # measured without a limit, once
    remove_leftovers()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / arguments.out
    rows: list[dict[str, Any]] = []
    with path.open("a" if arguments.append else "w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        if not file.tell():
            table.writeheader()
        for disk in arguments.disks:
            limit = DiskLimit(block_device(where), disk * 10**6) if disk else None
            for percent in arguments.budgets:
                budget = max(shape.info.least_budget, shape.info.slot_bytes * percent // 100)
                texts, steps = sorted(arguments.texts), arguments.steps
                task = Task(str(model), budget, texts, steps, disk * 10**6, arguments.trace, arguments.advice)
                head = {"model": model.stem, "disk_mb_per_s": disk, "budget_percent": percent}
                found: list[dict[str, Any]] = []
                for line in run(task, limit):
                    found.append({**head, "advice": task.advice, **line})
                    tell(found[-1])
                    table.writerow({name: rounded(value) for name, value in found[-1].items()})
                    file.flush()
                rows += found
                tell_choice(found)
    for name in ("error", "refined_error"):
        tell_errors(name, [abs(row[name]) for row in rows])


def run(task: Task, limit: DiskLimit | None) -> Iterator[dict[str, Any]]:
    """A worker's lines, as they come."""
    with groups(None, limit) as made:
        command = command_of("bench", made)
        # command_of() names a module; this program is a file.
        command = [*command[: command.index("-m")], __file__, "--worker", json.dumps(asdict(task))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            yield from (json.loads(line) for line in worker.stdout if line.startswith("{"))
    if worker.returncode != 0:
        print(f"a worker ended with code {worker.returncode}", file=sys.stderr)


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tell(row: dict[str, Any]) -> None:
    print(
        f"disk {row['disk_mb_per_s']:5} MB/s, {row['budget_percent']:3} %, {row['texts']:3} texts: "
        f"actual {row['actual_step_s']:.4f} s, planned {row['planned_step_s']:.4f} s, {row['error']:+.1%}, "
        f"refined {row['refined_step_s']:.4f} s, {row['refined_error']:+.1%}; others {row['other_cpu']:.2f}, "
        f"stolen {row['stolen_cpu']:.2f}",
        flush=True,
    )


def tell_choice(rows: Sequence[dict[str, Any]]) -> None:
    best = max(rows, key=lambda row: row["actual_tok_per_s"], default=None)
    for name in ("chosen", "chosen_next"):
        for row in (row for row in rows if row[name] and best is not None):
            share = row["actual_tok_per_s"] / best["actual_tok_per_s"]
            print(f"    {name} {row['texts']}, best {best['texts']}: {share:.1%} of its throughput", flush=True)


def tell_errors(name: str, errors: Sequence[float]) -> None:
    if errors:
        within = sum(error <= 0.15 for error in errors)
        median = statistics.median(errors)
        print(f"{name}: median {median:.1%}, largest {max(errors):.1%}; {within} of {len(errors)} within 15 %")


if __name__ == "__main__":
    main()
