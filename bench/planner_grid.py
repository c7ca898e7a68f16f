"""Does the planner foretell how long a step takes, and choose well? A grid of budgets, texts at once and disk limits.

For each limit on the disk and each budget a fresh process in a control group plans first and then runs n texts at once,
for every n; each cell is one line of CSV with the predicted and the actual seconds of a step and their difference. The
planner's choice is compared with the best n of the sweep. Prints the median and the largest error, and how far the
choice is from the best.

    .venv/bin/python bench/planner_grid.py [--model FILE] [--budgets 25 50 100] [--texts 1 2 4 8 16 32]
        [--disks 0 200 500] [--steps 24] [--trace FILE] [--refine]

A disk limit of 0 MB/s is none; others need control groups (root). --refine predicts with costs that the cells before
have corrected, as a long run would.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import PROMPTS, RESULTS

from pyengine.bench.cgroups import DiskLimit, block_device, groups, remove_leftovers
from pyengine.bench.launch import command_of

PROMPT_TOKENS = 24
HEADER = (
    *("disk_mb_per_s", "budget_percent", "texts", "planned_step_s", "actual_step_s", "error", "planned_missing"),
    *("actual_missing", "planned_experts_s", "actual_experts_s", "planned_attention_s", "actual_attention_s"),
    *("planned_waiting_s", "actual_waiting_s", "planned_tok_per_s", "actual_tok_per_s", "hidden", "chosen"),
)


@dataclass(frozen=True)
class Task:
    """What one process does: one budget on one disk, every number of texts."""

    model: str
    budget: int
    texts: list[int]
    n_steps: int
    bytes_per_s: int
    trace: str | None
    refine: bool


def worker(task: Task) -> None:
    """Plan, run, print one line of JSON for each number of texts."""
    from pyengine import Llama
    from pyengine.planner.batch_plan import demand_of
    from pyengine.planner.inequalities import StepShape, inequalities, step_time
    from pyengine.planner.refine import Refiner, StepRecord
    from pyengine.planner.solving import Memory, Work, solve
    from pyengine.planner.watching import StepWatch
    from pyengine.planning.shape import read_shape
    from pyengine.sessions import Request, SamplingParams, Scheduler, SessionState

    shape = read_shape(Path(task.model))
    costs = costs_here(shape, task.bytes_per_s)
    demand, _ = demand_of(shape, "lfu", Path(task.trace) if task.trace else None)
    slots = shape.slots(task.budget)
    work = Work(PROMPT_TOKENS, task.n_steps)
    most = max(task.texts)
    plan = solve(costs, demand, shape, Memory(0, 0, 0, task.budget), work, most_sequences=most)
    chosen = min(task.texts, key=lambda n: abs(n - plan.n_sequences))
    n_ctx = -(-most * (PROMPT_TOKENS + task.n_steps + 8) // 256) * 256
    # Fixed advice: what "auto" tries meanwhile is not what is checked here.
    llm = Llama(
        task.model, ram_budget=task.budget, policy="lfu", look_ahead="off", n_ctx=n_ctx, n_sequences=most, n_batch=512
    )
    total = Refiner(costs, demand, lambda: slots)
    for n in task.texts:
        now = total.costs if task.refine else costs
        cells = n * (PROMPT_TOKENS + task.n_steps / 2)
        step, load = StepShape(n, n, cells, min(slots)), demand.of(n, 0, slots)
        planned = step_time(now, step, load)
        seen: list[StepRecord] = []
        watch = StepWatch(llm, total)
        prompts = [llm.tokenize(PROMPTS[i % len(PROMPTS)].encode())[:PROMPT_TOKENS] for i in range(n)]
        sampling = SamplingParams(max_tokens=task.n_steps, temperature=1.0, ignore_eos=True)
        with Scheduler(llm, max_sequences=n) as scheduler:
            sessions = [
                scheduler.submit(Request(tokens, replace(sampling, seed=i + 1))) for i, tokens in enumerate(prompts)
            ]
            while not scheduler.idle:
                decoding = sum(one.state is SessionState.DECODING for one in sessions)
                used = float(sum(one.prompt_tokens + len(one.tokens) for one in sessions if not one.finished))
                pure = decoding == n or decoding == sum(not one.finished for one in sessions)
                watch.next_step(decoding, 0 if pure else PROMPT_TOKENS, used)
                watch.last = None
                scheduler.step()
                if decoding == n and watch.last is not None:
                    seen.append(watch.last)
        watch.stop()
        seen = seen[len(seen) // 3 :]  # the slots are as they stay
        if not seen:
            continue
        wall = statistics.median(one.wall_s for one in seen)
        kernels = statistics.median(one.compute_s for one in seen)
        stall = statistics.median(one.stall_s for one in seen)
        missing = statistics.median(one.missing for one in seen)
        told = {
            "texts": n,
            "planned_step_s": planned.total,
            "actual_step_s": wall,
            "error": planned.total / wall - 1,
            "planned_missing": load.missing * now.miss_factor,
            "actual_missing": missing / shape.info.n_layer,
            "planned_experts_s": planned.experts,
            "actual_experts_s": kernels,
            "planned_attention_s": planned.attention,
            "actual_attention_s": wall - kernels - stall,
            "planned_waiting_s": planned.waiting,
            "actual_waiting_s": stall,
            "planned_tok_per_s": n / planned.total,
            "actual_tok_per_s": n / wall,
            "hidden": int(all(one.holds for one in inequalities(now, step, load))),
            "chosen": int(n == chosen),
        }
        print(json.dumps(told), flush=True)
    llm.close()


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
    parser.add_argument("--steps", type=int, default=24, help="tokens of each text")
    parser.add_argument("--trace", default=None)
    parser.add_argument("--refine", action="store_true")
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
    costs_here(shape, 0)  # measured without a limit, once
    remove_leftovers()
    rows: list[dict[str, Any]] = []
    for disk in arguments.disks:
        limit = DiskLimit(block_device(where), disk * 10**6) if disk else None
        for percent in arguments.budgets:
            budget = max(shape.info.least_budget, shape.info.slot_bytes * percent // 100)
            task = Task(
                model=str(model),
                budget=budget,
                texts=sorted(arguments.texts),
                n_steps=arguments.steps,
                bytes_per_s=disk * 10**6,
                trace=arguments.trace,
                refine=arguments.refine,
            )
            found = [{"disk_mb_per_s": disk, "budget_percent": percent} | line for line in run(task, limit)]
            for row in found:
                print(
                    f"disk {disk:5} MB/s, {percent:3} %, {row['texts']:3} texts: "
                    f"planned {row['planned_step_s']:.4f} s, actual {row['actual_step_s']:.4f} s, {row['error']:+.1%}"
                )
            rows += found
            tell_choice(found)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / arguments.out).open("w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        table.writeheader()
        table.writerows(rows)
    errors = sorted(abs(row["error"]) for row in rows)
    if errors:
        within = sum(error <= 0.15 for error in errors)
        median = statistics.median(errors)
        print(f"error: median {median:.1%}, largest {errors[-1]:.1%}; {within} of {len(errors)} within 15 %")


def run(task: Task, limit: DiskLimit | None) -> list[dict[str, Any]]:
    """A worker's lines."""
    import subprocess

    with groups(None, limit) as made:
        command = command_of("bench", made)
        # command_of() names a module; this program is a file.
        command = [*command[: command.index("-m")], __file__, "--worker", json.dumps(asdict(task))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(f"a worker ended with code {done.returncode}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def tell_choice(rows: list[dict[str, Any]]) -> None:
    chosen = [row for row in rows if row["chosen"]]
    if chosen:
        best = max(rows, key=lambda row: row["actual_tok_per_s"])
        share = chosen[0]["actual_tok_per_s"] / best["actual_tok_per_s"]
        print(f"    chosen {chosen[0]['texts']}, best {best['texts']}: {share:.1%} of its throughput")


if __name__ == "__main__":
    main()
