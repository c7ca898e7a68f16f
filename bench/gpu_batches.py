"""Several texts at once on a GPU whose memory is smaller than the experts: throughput, and what the planner foretold.

For each share of the expert bytes in VRAM one process has pyengine, one stock llama.cpp with the experts of the first
layers on the CPU (as in gpu_tiers.py), through the same Scheduler. Texts are token ids, prompts a few of them; ours
take their experts from a trace, each text from a place of its own, and the planner knows that trace. For each number of
texts and the planner's own choice, steps that compute one token of each are timed once all prompts are done. The first
third of them corrects the prediction, the others are foretold by both and counted.

Writes one CSV line per cell as it comes:

    .venv/bin/python bench/gpu_batches.py MODEL --trace gpt-oss-20b.npz [--shares 25 50] [--texts 1 2 4 8 16]
        [--seconds 3] [--gpu CUDA0] [--link 0] [--csv FILE] [--skip-stock]
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
from pathlib import Path
from typing import Any

import llama_cpp  # before numpy: a llama.cpp that brings its own C++ library may take numpy's for it, and crash
import numpy as np

HEADER = (
    *("model", "vram_share", "row", "n", "chosen", "steps", "tok_per_s", "step_ms", "before_ms", "after_ms"),
    *("before_error", "after_error", "planned_tok_per_s", "link_mb_per_token", "missing_per_layer", "waiting_share"),
    *("link_gb_per_s", "limit_gb_per_s"),
)
STOCK = "ncmoe"
#: Tokens of a prompt, and steps of a kind before any counts.
PROMPT, WARM_UP, LEAST = 8, 3, 9
#: What is computed of a text at most; its KV cells.
ANSWER = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--trace", type=Path, required=True, help="ids [token, layer, rank] in an npz")
    parser.add_argument("--shares", type=float, nargs="+", default=[25, 50], help="percent of the expert bytes in VRAM")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--most", type=int, default=64, help="texts that the context has room for")
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps in a cell")
    parser.add_argument("--gpu", default="CUDA0")
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--link", type=float, default=0.0, help="GB/s, of an imitated slow link")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--skip-stock", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    began = time.monotonic()
    file = given.csv.open("w", newline="") if given.csv else None
    table = csv.DictWriter(file or sys.stdout, HEADER)
    table.writeheader()
    for share in given.shares:
        for row in ("pyengine", *(() if given.skip_stock else (STOCK,))):
            for line in cells(given, row, share):
                table.writerow({"model": given.model.name, "vram_share": share, "row": row} | line)
                if file:
                    file.flush()
                    print({"row": row, "share": share} | line, flush=True)
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)


def cells(given: argparse.Namespace, row: str, share: float) -> Any:
    """Figures of one process, as they come."""
    task = json.dumps({"row": row, "share": share})
    command = [sys.executable, "-X", "faulthandler", *sys.argv, "--worker", task]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    end = time.monotonic() + given.limit
    try:
        for line in process.stdout:
            if line.startswith("CELL "):
                yield json.loads(line[5:])
            if time.monotonic() > end:
                print(f"{row} {share}: cut after {given.limit:.0f} s", file=sys.stderr)
                break
        else:
            code = process.wait()
            if code:
                print(f"{row} {share}: ended with {code}", file=sys.stderr)
    finally:
        process.kill()
        process.wait()


class Texts:
    """Texts of one model, together.

    Args:
        llm: with a context for as many as any n; ids: the experts of their tokens, [token, layer, rank].
    """

    def __init__(self, llm: Any, ids: Any, seconds: float) -> None:
        self._llm, self._ids, self._seconds = llm, ids, seconds
        self._native = llm.engine.native if llm.engine is not None else None

    def run(self, n: int, chosen: bool, plan: Any) -> dict[str, Any]:
        """Time n of them. plan: with the costs and the demand of ours; None: stock."""
        from pyengine.sessions import Request, SamplingParams, Scheduler, SessionState

        random = np.random.default_rng(n)
        top = min(30000, self._llm.n_vocab() - 1)
        with Scheduler(self._llm, max_sequences=n, prompt_chunk=512) as scheduler:
            sessions = []
            for number in range(n):
                sampling = SamplingParams(max_tokens=ANSWER, seed=number, ignore_eos=True)
                prompt = [int(t) for t in random.integers(top // 2, top, PROMPT)]
                sessions.append(scheduler.submit(Request(prompt, sampling)))
            while not all(one.state is SessionState.DECODING for one in sessions):
                scheduler.step()
            self._follow(n)
            for _ in range(WARM_UP + (0 if self._native is None else max(4, 64 // n))):  # the slots hold what they will
                scheduler.step()
            steps = self._timed(scheduler, sessions, n)
        for one in sessions:
            if one.error is not None:
                raise one.error
        return figures(steps, n, chosen, plan)

    def _follow(self, n: int) -> None:
        """Text i goes on from its own place of the trace: a step takes a row of each in turn."""
        if self._native is None:
            return
        have, n_step = len(self._ids), ANSWER + WARM_UP
        begins = np.random.default_rng(0).permutation(n) * have // n
        rows = (begins[None, :] + np.arange(n_step)[:, None]) % have
        self._native.set_replay(self._ids[rows.reshape(-1)].astype(np.int32))

    def _timed(self, scheduler: Any, sessions: list[Any], n: int) -> list[dict[str, float]]:
        steps: list[dict[str, float]] = []
        end = time.perf_counter() + self._seconds
        while len(steps) < LEAST or time.perf_counter() < end:
            if any(one.finished for one in sessions) or max(len(one.tokens) for one in sessions) > ANSWER - 2:
                break
            before, started = self._counts(), time.perf_counter()
            scheduler.step()
            wall = time.perf_counter() - started
            after = self._counts()
            grown = {name: float(after[name] - before[name]) for name in after}
            steps.append(
                {"wall_s": wall, "n": float(n), "cells": float(n * (PROMPT + len(sessions[0].tokens)))} | grown
            )
        return steps

    def _counts(self) -> dict[str, int]:
        return {} if self._native is None else self._native.stats()


def figures(steps: list[dict[str, float]], n: int, chosen: bool, plan: Any) -> dict[str, Any]:
    """Of the steps after the first third, which correct the prediction."""
    later = steps[len(steps) // 3 :]
    mean = statistics.mean(one["wall_s"] for one in later)
    out: dict[str, Any] = {"n": n, "chosen": chosen, "steps": len(later), "tok_per_s": n / mean, "step_ms": mean * 1e3}
    if plan is None:
        return out
    from pyengine.planner.inequalities import StepShape
    from pyengine.planner.refine import Refiner, StepRecord
    from pyengine.planner.step_times import step_time

    costs, demand, slots = plan["costs"], plan["demand"], plan["slots"]
    refiner = Refiner(costs, demand, lambda: slots)
    for one in steps[: len(steps) // 3]:
        missing, ahead = int(one["misses"]), int(one["prefetch_hits"])
        times = (one["wall_s"], one["compute_ns"] / 1e9, one["stall_ns"] / 1e9, one["io_ns"] / 1e9)
        wanted = int(one["hits"]) + missing
        refiner.observe(StepRecord(n, 0, one["cells"], *times, wanted, missing, missing + ahead))
    shape = StepShape(n, n, statistics.mean(one["cells"] for one in later), min(slots))
    load = demand.of(n, 0, slots)
    before, after = (step_time(known, shape, load).total for known in (costs, refiner.costs))
    moved, took = sum(one["link_bytes"] for one in later), sum(one["wall_s"] for one in later)
    return out | {
        "before_ms": before * 1e3,
        "after_ms": after * 1e3,
        "before_error": before / mean - 1,
        "after_error": after / mean - 1,
        "planned_tok_per_s": n / before,
        "link_mb_per_token": moved / 1e6 / (n * len(later)),
        "missing_per_layer": statistics.mean(one["misses"] for one in later) / demand.n_layer,
        "waiting_share": sum(one["stall_ns"] for one in later) / 1e9 / took,
        "link_gb_per_s": costs.transfer_bytes / costs.transfer_s / 1e9 if costs.transfer_s else None,
        "limit_gb_per_s": plan["limit"] or None,
    }


def worker(given: argparse.Namespace) -> None:
    task = json.loads(given.worker)
    if task["row"] == STOCK:
        texts = Texts(stock(given, task["share"]), None, given.seconds)
        for n in given.texts:
            print("CELL " + json.dumps(texts.run(n, False, None)), flush=True)
        return
    with np.load(given.trace) as file:
        ids = file["ids"]
    llm = ours(given, task["share"])
    plan = planned(llm, ids, given)
    texts = Texts(llm, ids, given.seconds)
    for n in dict.fromkeys((*given.texts, plan["n"])):
        print("CELL " + json.dumps(texts.run(n, n == plan["n"], plan)), flush=True)


def options(given: argparse.Namespace) -> dict[str, Any]:
    n_ctx = -(-given.most * (PROMPT + ANSWER) // 256) * 256
    threads = {"n_threads": given.threads, "n_threads_batch": given.threads}
    return {"n_ctx": n_ctx, "n_batch": 512, "verbose": False} | threads


def ours(given: argparse.Namespace, share: float) -> Any:
    from pyengine import Llama

    llm = Llama(
        str(given.model),
        gpu=given.gpu,
        vram_budget=f"{share:g}%",
        ram_budget=given.ram,
        policy="lfu",
        look_ahead="off",
        n_sequences=given.most,
        **options(given),
    )
    if llm.engine is None:
        raise SystemExit(llm.engaged)
    # Every expert has been through RAM once.
    llm.engine.native.set_look_ahead(False)
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        llm.reset()
        llm.eval([int(t) for t in random.integers(0, min(30000, llm.n_vocab() - 1), 512)])
    llm.reset()
    llm.engine.native.set_link_limit(int(given.link * 1e9))
    return llm


def planned(llm: Any, ids: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Costs measured now, the trace's demand, and the number of texts that follows from them."""
    from pyengine.planner.batch_plan import shape_of
    from pyengine.planner.demand import Demand
    from pyengine.planner.gpu_measuring import costs_on_gpu
    from pyengine.planner.solving import Memory, Work, solve
    from pyengine.planning.routing import Routing
    from pyengine.traces import Prompts

    shape, stats = shape_of(llm), llm.expert_stats()
    costs = costs_on_gpu(llm, shape)
    print(costs, file=sys.stderr)
    routing = Routing(np.sort(ids, axis=2), shape.classes[0].n_expert, True, Prompts())
    demand = Demand(routing, [c.layers for c in shape.classes], "lfu")
    work = Work(PROMPT, ANSWER)
    memory = Memory(1 << 50, 0, 0, int(stats["budget_bytes"]))
    found = solve(costs, demand, shape, memory, work, most_sequences=given.most)
    for one in found.tried:
        print(f"n {one.n_sequences}: {one.step.total * 1e3:.1f} ms, {one.tokens_per_s:.1f} tok/s", file=sys.stderr)
    slots = shape.slots(int(stats["budget_bytes"]))
    return {"costs": costs, "demand": demand, "n": found.n_sequences, "slots": slots, "limit": given.link}


def stock(given: argparse.Namespace, share: float) -> Any:
    """llama_cpp.Llama with several sequences, the experts of its first layers on the CPU, for a Scheduler."""
    import ctypes

    from batch_worker import stock_class

    from pyengine.planning.shape import read_shape

    n_layer = read_shape(given.model).info.n_layer
    away = int(n_layer * (1 - share / 100) + 1e-9)
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p

    class Override(ctypes.Structure):
        _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))

    array = (Override * 2)()
    if away:
        which = "|".join(str(i) for i in range(away))
        array[0].pattern = rf"blk\.({which})\.ffn_(up|down|gate|gate_up)_exps\.weight".encode()
        array[0].buft = lib.ggml_backend_cpu_buffer_type()

    class Split(stock_class(given.most)):  # type: ignore[misc]
        # The base class builds and uses this in its __init__; the field is set as soon as it is there.
        @property
        def model_params(self) -> Any:
            if array[0].pattern:
                self._params.tensor_buft_overrides = ctypes.cast(array, ctypes.c_void_p)
            return self._params

        @model_params.setter
        def model_params(self, value: Any) -> None:
            self._params = value

    return Split(str(given.model), n_gpu_layers=-1, **options(given))


if __name__ == "__main__":
    main()
