"""One cell of batch_ablation.py: load the model one way, answer the same lines, print one line of JSON. Stock llama.cpp
runs through the same Scheduler, so that all columns compute in the same steps; pyengine's native part is not loaded
then."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passages import passages

from pyengine.bench.child import PR_SET_PDEATHSIG, loaded_libraries, without_profiles
from pyengine.bench.process_counters import peak_resident, process_counters

_COUNTERS = ("hits", "misses", "bytes_read", "stall_seconds", "compute_seconds", "prefetch_hits")


@dataclass(frozen=True)
class Task:
    """What to do. n: lines at once, None: the planner chooses. most: sequences and KV cells there are, in lines.
    bytes_per_s: of the disk, if it is limited, for the planner: costs that are known were measured without.
    mapped: stock memory-maps the file and repacks nothing, so that pages can be dropped."""

    model: str
    stock: bool
    n: int | None
    prompt_chunk: int | None
    most: int
    budget: int
    bundle: str
    policy: str
    look_ahead: str
    rules: dict[str, bool]
    n_lines: int
    prompt_tokens: int
    answer_tokens: int
    seed: int
    seconds: float
    n_threads: int
    bytes_per_s: int | None
    mapped: bool = False

    @property
    def n_ctx(self) -> int:
        """KV cells."""
        return -(-self.most * (self.prompt_tokens + self.answer_tokens) // 256) * 256


def load(task: Task) -> Any:
    """The model, with room for as many lines as any column computes at once."""
    options: dict[str, Any] = {
        "n_ctx": task.n_ctx,
        "n_batch": 512,
        "n_threads": task.n_threads,
        "n_threads_batch": task.n_threads,
        "verbose": False,
    }
    if task.stock:
        return stock_class(task.most, task.mapped)(task.model, use_mmap=task.mapped, **options)
    from pyengine import Llama

    llm = Llama(
        task.model,
        ram_budget=task.budget,
        bundle=task.bundle,
        policy=task.policy,
        look_ahead=task.look_ahead,
        n_sequences=task.most,
        **options,
    )
    if llm.engine is None:
        raise RuntimeError(llm.engaged)
    if task.rules:
        llm.engine.native.set_prefetch_rules(**task.rules)
    return llm


def stock_class(n_sequences: int, mapped: bool = False) -> Any:
    """llama_cpp.Llama with several sequences, and mapped as `pyengine bench` does it, for which it has no options, and
    with what a Scheduler asks for."""
    import llama_cpp

    from pyengine.one_user import OneUser

    class StockTexts(llama_cpp.Llama):
        engine = None  # as a pyengine.Llama that manages no experts

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._user = OneUser()
            super().__init__(*arguments, **options)

        @property
        def context_params(self) -> Any:
            return self._context

        @context_params.setter
        def context_params(self, value: Any) -> None:
            value.n_seq_max, value.kv_unified = n_sequences, True
            self._context = value

        @property
        def model_params(self) -> Any:
            return self._params

        @model_params.setter
        def model_params(self, value: Any) -> None:
            value.use_extra_bufts = value.use_extra_bufts and not mapped
            self._params = value

    return StockTexts


def set_course(llm: Any, task: Task, costs: Any) -> Any:
    """How many lines at once, as `pyengine batch` settles it, whatever the number of lines."""
    from pyengine.batch.course import Course

    if task.n is not None:
        return Course(task.n, task.prompt_chunk or llm.n_batch)
    from pyengine.planner.batch_plan import Refining, plan_batch

    plan = plan_batch(
        llm,
        prompt_tokens=task.prompt_tokens,
        answer_tokens=task.answer_tokens,
        most_sequences=min(task.most, task.n_lines),
        costs=costs,
    )
    return Course(plan.n_sequences, plan.chosen.prompt_chunk, Refining.begin(llm, plan))


def counters(llm: Any) -> dict[str, float]:
    """What only grows."""
    stats = llm.expert_stats() if hasattr(llm, "expert_stats") else {}
    return {name: float(stats.get(name, 0)) for name in _COUNTERS} | process_counters()


def run(task: Task, costs: Any) -> dict[str, Any]:
    """Load, answer, count."""
    from pyengine.batch import BatchSummary
    from pyengine.sessions import Request, SamplingParams, Scheduler

    started = time.perf_counter()
    llm = load(task)
    load_s = time.perf_counter() - started
    with contextlib.closing(llm):
        print("answer", file=sys.stderr, flush=True)
        prompts = passages(llm.tokenize, task.n_lines, task.prompt_tokens, task.seed)
        sampling = SamplingParams(max_tokens=task.answer_tokens, temperature=0, ignore_eos=True)
        before, summary = counters(llm), BatchSummary()
        started, steps = time.perf_counter(), 0
        course = set_course(llm, task, costs)
        plan_s = time.perf_counter() - started
        course.enter(summary)
        with Scheduler(llm, max_sequences=course.parallel, prompt_chunk=course.prompt_chunk) as scheduler:
            sessions = [scheduler.submit(Request(tokens, sampling)) for tokens in prompts]
            while not scheduler.idle and time.perf_counter() - started < task.seconds:
                course.next_step(one for one in sessions if not one.finished)
                scheduler.step()
                steps += 1
            seconds = time.perf_counter() - started
            done = [one.finish_reason == "length" for one in sessions]
        for one in sessions:
            if one.error is not None:
                raise one.error
        course.finish(summary)
        first = [one.times.first_token - one.times.submitted for one in sessions if one.times.first_token is not None]
        return {
            "status": "ok",
            "cut": not all(done),
            "n": course.parallel,
            "prompt_chunk": course.prompt_chunk,
            "load_s": load_s,
            "plan_s": plan_s,
            "seconds": seconds,
            "steps": steps,
            "finished": sum(done),
            "generated": sum(len(one.tokens) for one in sessions),
            "first_token_s": statistics.median(first) if first else None,
            "planned_step_s": summary.planned_step_s,
            "actual_step_s": summary.actual_step_s,
            "step_lines": summary.step_lines,
            "counts": {name: value - before.get(name, 0) for name, value in counters(llm).items()},
            "tokens": [list(one.tokens) if ended else None for one, ended in zip(sessions, done, strict=True)],
            "peak_rss": peak_resident(),
            "libraries": loaded_libraries(),
        }


def costs_known(task: Task) -> Any:
    """What this machine is known to take, as `pyengine plan --batch` has measured it; None: nothing is known."""
    if task.stock or task.n is not None:
        return None
    from pyengine.planner.batch_plan import known_costs
    from pyengine.planning.shape import read_shape

    costs = known_costs(read_shape(Path(task.model)))
    return costs.with_bandwidth(task.bytes_per_s) if costs is not None and task.bytes_per_s else costs


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = Task(**json.load(sys.stdin))
    try:
        costs = costs_known(task)
        with without_profiles():
            result = run(task, costs)
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
