"""Fully resident: is pyengine as fast as stock llama.cpp when every expert fits?

Two processes, one of which never loads pyengine, measure in turns (A B A B ...) so that a noisy minute hits both.
Writes one CSV line per measurement and prints medians and the ratio with its 95 % bootstrap interval.

    .venv/bin/python bench/resident_speed.py [--rounds 12] [--decode 64] [--prefill 512] [--model FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pyengine.bench.summary import interval

RESULTS = Path(__file__).parent / "results" / "resident_speed.csv"


def worker(engine: str, model: str, threads: int) -> None:
    """Answer {"prefill": n} or {"decode": n} on stdin with the tokens per second, until stdin ends."""
    import numpy as np

    common: dict[str, Any] = {"n_ctx": 4096, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    if engine == "stock":
        from llama_cpp import Llama

        llm = Llama(model, **common)
    else:
        from pyengine import Llama as Ours

        llm = Ours(model, ram_budget="100%", **common)
    prompt = llm.tokenize(
        (" ".join(f"Sentence number {i} is not like the one before it." for i in range(900))).encode()
    )

    def decode(n: int) -> float:
        llm.reset()
        llm.eval(prompt[:32])
        start = time.perf_counter()
        for _ in range(n):
            logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
            llm.eval([int(logits.argmax())])
        return n / (time.perf_counter() - start)

    def prefill(n: int) -> float:
        llm.reset()
        start = time.perf_counter()
        llm.eval(prompt[:n])
        return n / (time.perf_counter() - start)

    prefill(min(512, len(prompt)))  # every expert once, so that nothing is missing
    decode(16)
    for line in sys.stdin:
        task = json.loads(line)
        speed = decode(task["decode"]) if "decode" in task else prefill(task["prefill"])
        print(json.dumps(speed), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--decode", type=int, default=64, help="tokens per decode measurement")
    parser.add_argument("--prefill", type=int, default=512, help="tokens per prefill measurement")
    parser.add_argument("--model", default=None)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--worker", choices=["stock", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.model, arguments.threads)
        return

    from pyengine.bundled import bundled_model
    from pyengine.llama import default_threads

    model = arguments.model or str(bundled_model())
    threads = arguments.threads or default_threads()
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--worker", engine, "--model", model, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for engine in ("stock", "ours")
    }

    def ask(engine: str, task: dict[str, int]) -> float:
        process = workers[engine]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        speed = float(json.loads(process.stdout.readline()))
        time.sleep(0.1)  # let its OpenMP threads fall asleep before the other one starts
        return speed

    tasks = {"decode": {"decode": arguments.decode}, "prefill": {"prefill": arguments.prefill}}
    rows = []
    for n in range(arguments.rounds):
        for phase, task in tasks.items():
            order = ("stock", "ours") if n % 2 == 0 else ("ours", "stock")
            speeds = {engine: ask(engine, task) for engine in order}
            rows += [(n, phase, engine, f"{speed:.2f}") for engine, speed in speeds.items()]
    for process in workers.values():
        assert process.stdin
        process.stdin.close()
        process.wait()

    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["# n_threads and n_threads_batch", threads, "machine", platform.machine(), Path(model).name])
        table.writerow(["round", "phase", "engine", "tokens_per_second"])
        table.writerows(rows)
    for phase in tasks:
        stock = [float(v) for _, p, e, v in rows if p == phase and e == "stock"]
        ours = [float(v) for _, p, e, v in rows if p == phase and e == "ours"]
        ratios = [b / a for a, b in zip(stock, ours, strict=True)]
        low, high = interval(ratios)
        print(
            f"{phase}: stock {statistics.median(stock):.1f} tok/s, pyengine {statistics.median(ours):.1f} tok/s, "
            f"ratio {statistics.median(ratios):.3f} (95 %: {low:.3f} .. {high:.3f}, {len(ratios)} pairs)"
        )


if __name__ == "__main__":
    main()
