"""Prompts with every expert resident: at each length, is pyengine as fast as stock llama.cpp?

Two processes, one of which never loads pyengine, have the same threads, context and batch and all weights in memory
(stock: use_mmap=False; pyengine: ram_budget="100%"). They measure in turns, A B B A ..., so that a noisy minute hits
both. A measurement computes as many prompts of a length as take about --seconds, the same texts in both, with an empty
KV cache each, and reads a logit of the last token. Lengths take turns too: a round has a pair of each.

Writes one CSV line per measurement as it comes; prints for each length the ratio, the median of the medians of the two
processes' starts (--append adds one to a CSV), and its 95 % bootstrap interval.

    .venv/bin/python bench/prompt_pairs.py [--lengths 1,2,4,8] [--rounds 20] [--seconds 0.4] [--limit 200] [--append]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS
from passages import passages

from pyengine.bench.child import loaded_libraries
from pyengine.bench.quiet import CpuClock

ENGINES = ("stock", "pyengine")
#: A prompt begins so many tokens after the one before it, in a text that is so much longer than a prompt.
STRIDE, SPARE = 37, 512
#: Of the bootstrap.
RESAMPLES = 2000
HEADER = ("model", "threads", "tokens", "round", "engine", "prompts", "seconds", "tok_per_s", "missed", "stolen_cpu")


class Measured(NamedTuple):
    """Seconds of all prompts together, and experts that were not resident."""

    seconds: float
    missed: int


def worker(engine: str, model: str, threads: int, longest: int) -> None:
    """For each [tokens, prompts] on stdin a line with the fields of Measured, until stdin ends."""
    options: dict[str, Any] = {
        "n_ctx": max(1024, -(-longest // 256) * 256),
        "n_batch": 512,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    if engine == "stock":
        from llama_cpp import Llama

        llm: Any = Llama(model, use_mmap=False, **options)
    else:
        from pyengine import Llama as Ours

        llm = Ours(model, ram_budget="100%", **options)
    (text,) = passages(llm.tokenize, 1, longest + SPARE, 1)

    def prompts(n_tokens: int, count: int) -> Measured:
        before = llm.expert_stats()["misses"] if hasattr(llm, "expert_stats") else 0
        seconds = 0.0
        for number in range(count):
            begin = number * STRIDE % SPARE
            tokens = text[begin : begin + n_tokens]
            llm.reset()
            started = time.perf_counter()
            llm.eval(tokens)
            llm._ctx.get_logits()[0]  # it waits for the kernels
            seconds += time.perf_counter() - started
        after = llm.expert_stats()["misses"] if hasattr(llm, "expert_stats") else 0
        return Measured(seconds, int(after - before))

    while prompts(512, 1).missed:  # until every expert is here
        pass
    if engine == "stock" and loaded_libraries():
        raise RuntimeError(f"the stock process has loaded {loaded_libraries()}")
    print(json.dumps(prompts(1, 1)), flush=True)
    for line in sys.stdin:
        print(json.dumps(prompts(*json.loads(line))), flush=True)


class Side:
    """The process of one engine."""

    def __init__(self, engine: str, model: str, threads: int, longest: int) -> None:
        given = ["--worker", engine, "--model", model, "--threads", str(threads), "--lengths", str(longest)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, n_tokens: int, count: int) -> Measured:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([n_tokens, count]) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        time.sleep(0.02)  # its OpenMP threads fall asleep before the other one's begin
        return found

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Measured:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a process has ended too soon")
        return Measured(*json.loads(line))


def main() -> None:
    arguments = parsed()
    lengths = [int(part) for part in arguments.lengths.split(",")]
    if arguments.worker:
        worker(arguments.worker, arguments.model, arguments.threads, max(lengths))
        return

    from pyengine.bundled import bundled_model
    from pyengine.llama import default_threads

    model = str(arguments.model or bundled_model())
    threads = arguments.threads or default_threads()
    sides = {engine: Side(engine, model, threads, max(lengths)) for engine in ENGINES}
    begun = time.monotonic()
    counts = dict.fromkeys(lengths, 1)
    if arguments.seconds > 0:
        counts = {n: max(1, round(arguments.seconds / sides["stock"].ask(n, 1).seconds)) for n in lengths}
    path = RESULTS / arguments.csv
    with path.open("a" if arguments.append else "w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        if not file.tell():
            table.writeheader()
        for number in range(arguments.rounds):
            if time.monotonic() - begun > arguments.limit:
                break
            order = ENGINES if number % 2 == 0 else ENGINES[::-1]
            for n in lengths:
                found = {}
                before = CpuClock.now()
                for engine in order:
                    found[engine] = sides[engine].ask(n, counts[n])
                _, stolen = CpuClock.now().others_since(before, 0.0)
                for engine in order:
                    speed = n * counts[n] / found[engine].seconds
                    values = (f"{found[engine].seconds:.5f}", f"{speed:.3f}", found[engine].missed, f"{stolen:.3f}")
                    head = (Path(model).stem, threads, n, number, engine, counts[n])
                    table.writerow(dict(zip(HEADER, (*head, *values), strict=True)))
            file.flush()
    for side in sides.values():
        side.close()
    tell(pairs_of(path))


def pairs_of(path: Path) -> Mapping[int, Sequence[Sequence[float]]]:
    """Tokens -> by start of the two processes, how many times as fast as stock pyengine was in each pair of a CSV."""
    starts: dict[int, list[list[float]]] = defaultdict(list)
    last: dict[int, int] = {}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for two in zip(lines[::2], lines[1::2], strict=True):
        stock, ours = (next(one for one in two if one["engine"] == engine) for engine in ENGINES)
        n, number = int(ours["tokens"]), int(ours["round"])
        if number <= last.get(n, number):  # rounds begin again: other processes
            starts[n].append([])
        last[n] = number
        starts[n][-1].append(float(ours["tok_per_s"]) / float(stock["tok_per_s"]))
    return starts


def middle(starts: Sequence[Sequence[float]]) -> float:
    """Median of the starts' medians: where a process's memory came to lie is worth some percent, in all its pairs."""
    return statistics.median(statistics.median(pairs) for pairs in starts)


def interval(starts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % bootstrap interval of middle(): starts are drawn, and of each its pairs."""
    chance = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = chance.choices(starts, k=len(starts))
        found.append(middle([chance.choices(pairs, k=len(pairs)) for pairs in drawn]))
    found.sort()
    tail = RESAMPLES // 40
    return found[tail], found[-tail - 1]


def tell(ratios: Mapping[int, Sequence[Sequence[float]]]) -> None:
    for n, starts in sorted(ratios.items()):
        low, high = interval(starts)
        print(
            f"{n:5} tokens: {middle(starts):.3f} (95 %: {low:.3f} .. {high:.3f}, {sum(map(len, starts))} pairs, "
            f"{len(starts)} starts)"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: the bundled model")
    parser.add_argument("--lengths", default="1,2,4,8,16,32,64,128,512,2048,8192", help="tokens")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a measurement, about; 0: one prompt")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no round begins")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--append", action="store_true", help="to the CSV of an earlier call")
    parser.add_argument("--csv", default="prompt_pairs.csv", help="in bench/results")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
