"""Throughput against latency: several numbers of texts at once, pyengine as it comes and every baseline.

For each number of texts each kind decodes them together in a fresh process with an empty page cache. Kinds are those of
`pyengine bench` (its --rows help). All but stock with everything in memory are in a control group with the memory of
the budget: it, the model's other weights, the allowance of `pyengine bench` and a KV cache for the most texts. Stock
runs through the same Scheduler, so that it computes the same steps. Only steps in which all texts decode and nothing
else is computed are timed, after two of them, until they have taken --seconds; prompts are not. A text's next token
takes a step (the median), and all texts together have one token each in it.

Writes one CSV line per cell as it comes, which throughput_latency.py draws.

    .venv/bin/python bench/batch_curves.py [--model FILE] [--budget 25%] [--texts 1 4 16 32] [--rounds 1] [--seconds 8]
        [--kinds auto stock-resident stock-mmap-plain on-demand lru-bundle] [--disk 200M] [--append]
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, replace
from typing import Any

from batch_worker import Task
from cold_runs import Cold, ColdRuns
from common import RESULTS

from pyengine.bench.rows import (
    ADVICE,
    AUTO,
    BUNDLED,
    LRU_BUNDLE,
    ON_DEMAND,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
    ModelFacts,
    plan_rows,
)
from pyengine.llama import default_threads
from pyengine.planning.shape import read_shape

KINDS = (AUTO, STOCK_RESIDENT, STOCK_MMAP_PLAIN, ON_DEMAND, LRU_BUNDLE)
HEADER = (
    *("model", "budget", "disk", "round", "kind", "n", "status", "reason", "steps", "step_s", "tok_per_s", "prompts_s"),
    *("load_s", "hit_rate", "mb_per_token", "disk_mb_per_token", "limit_mb", "peak_mb", "other_cpu"),
)


def main() -> None:
    arguments = parsed()
    cold = ColdRuns(arguments.model, arguments.disk)
    share = float(arguments.budget.removesuffix("%"))
    row = plan_rows(cold.facts, [LRU_BUNDLE], [share])[0]
    base = Task(
        model=str(cold.model),
        stock=False,
        n=1,
        prompt_chunk=None,
        most=arguments.most or max(arguments.texts),
        budget=row.budget,
        bundle="off",
        policy="auto",
        look_ahead="auto",
        rules={},
        n_lines=0,
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
        seed=0,
        seconds=arguments.seconds,
        n_threads=arguments.threads or default_threads(),
        bytes_per_s=cold.bytes_per_s,
    )
    limit = (row.limit or 0) + base.n_ctx * read_shape(cold.model).kv_bytes_per_token
    print(f"memory of all but {STOCK_RESIDENT}: {limit / 1e6:.0f} MB", flush=True)
    head = {"model": cold.model.stem, "budget": arguments.budget, "disk": arguments.disk or ""}
    path = RESULTS / arguments.csv
    with path.open("a" if arguments.append else "w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        if not file.tell():
            table.writeheader()
        for number in range(arguments.rounds):
            for n in arguments.texts:
                for kind in arguments.kinds:
                    task = replace(task_of(base, kind, cold.facts, str(cold.bundle)), n=n, seed=arguments.seed + number)
                    memory = None if kind == STOCK_RESIDENT else limit
                    line = line_of(cold.run("curve_worker", asdict(task), memory, task.seconds), task, memory)
                    line |= head | {"round": number, "kind": kind, "n": n}
                    table.writerow(line)
                    file.flush()
                    print(", ".join(f"{name} {line.get(name)}" for name in SHOWN), flush=True)


SHOWN = ("kind", "n", "status", "tok_per_s", "step_s", "prompts_s", "hit_rate", "disk_mb_per_token")


def task_of(base: Task, kind: str, facts: ModelFacts, bundle: str) -> Task:
    if kind in (STOCK_RESIDENT, STOCK_MMAP_PLAIN):
        return replace(base, stock=True, mapped=kind == STOCK_MMAP_PLAIN)
    advice = ADVICE[kind]
    budget = plan_rows(facts, [ON_DEMAND])[0].budget if kind == ON_DEMAND else base.budget
    return replace(
        base,
        budget=budget,
        bundle=bundle if kind in BUNDLED else "off",
        policy=advice.policy,
        look_ahead=advice.look_ahead,
        rules=dict(advice.rules),
    )


def line_of(cold: Cold, task: Task, limit: int | None) -> dict[str, Any]:
    """A cell's figures, under the CSV's names."""
    outcome, found = cold.outcome, cold.result
    general = {
        "status": outcome.status,
        "reason": outcome.reason,
        "limit_mb": "" if limit is None else f"{limit / 1e6:.0f}",
        "peak_mb": "" if outcome.memory.peak is None else f"{outcome.memory.peak / 1e6:.0f}",
        "other_cpu": f"{cold.other_cpu:.2f}",
    }
    if not found or outcome.status != "ok":
        return general
    if task.stock and found["libraries"]:
        sys.exit(f"a stock process has loaded {found['libraries']}; its figures would not be stock's")
    counts, tokens = found["counts"], found["steps"] * found["n"]
    accesses = counts["hits"] + counts["misses"]
    return general | {
        "steps": found["steps"],
        "step_s": f"{found['step_s']:.4f}",
        "tok_per_s": f"{found['n'] / found['step_s']:.3f}",
        "prompts_s": f"{found['prompts_s']:.2f}",
        "load_s": f"{found['load_s']:.2f}",
        "hit_rate": f"{counts['hits'] / accesses:.4f}" if accesses else "",
        "mb_per_token": f"{counts['bytes_read'] / 1e6 / tokens:.2f}",
        "disk_mb_per_token": f"{counts.get('disk_bytes', 0) / 1e6 / tokens:.2f}",
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: the bundled model")
    parser.add_argument("--budget", default="25%", help="percent of all experts")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 4, 16, 32], help="at once")
    parser.add_argument("--most", type=int, default=0, help="texts the KV cache has room for; 0: most of --texts")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=64, help="at most; the model's end token is ignored")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps in a cell")
    parser.add_argument("--disk", default=None, metavar="200M", help="bytes that may be read per second (as root)")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's texts")
    parser.add_argument("--append", action="store_true", help="to the CSV of an earlier call")
    parser.add_argument("--csv", default="batch_curves.csv", help="in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
