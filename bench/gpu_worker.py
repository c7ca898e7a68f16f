"""One row of gpu_rows.py in a process of its own, kept loaded: takes requests, one line of JSON each, and answers each
with one. The first line is the task; what "do" can be is what Worker's methods are called."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_rows
import llama_cpp
import numpy as np

#: Counters whose growth is reported, summed over a request's timed tokens.
COUNTERS = (
    *("hits", "misses", "prefetch_hits", "syncs", "begun_ahead", "computed_again", "link_bytes", "link_ns"),
    *("reads", "predict_ns", "stall_ns", "host_pairs", "host_ns"),
)

#: Decoded before the clock starts: the other processes' kernels were on the GPU.
_UNTIMED = 3


class Worker:
    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._row = row = gpu_rows.Row(*task["row"])
        start = time.perf_counter()
        self._llm = gpu_rows.load(row, task)
        self.load_s = time.perf_counter() - start
        engine = getattr(self._llm, "engine", None)
        self._native = engine.native if engine is not None else None
        self._ids: Any = None
        if task["trace"] and self._native is not None:
            with np.load(task["trace"]) as trace:
                self._ids = trace["ids"]

    # ---- what can be asked for

    def warm(self, chunks: int, tokens: int, at: int, seconds: float, link: int) -> dict[str, Any]:
        """Prompts that route by their own router until every expert has passed, then decoding."""
        if self._native is not None:
            for i in range(chunks):
                self._llm.reset()
                self._compute(self._random(i, 512))
        self._llm.reset()
        self._compute(self._random(at, 32))
        return self.decode(at=at, tokens=tokens, seconds=seconds, link=link)

    def decode(self, at: int, tokens: int, seconds: float, link: int) -> dict[str, Any]:
        """Up to so many tokens one by one, for about so many seconds; texts go on where the last one ended."""
        if self._llm.n_tokens + tokens + _UNTIMED > self._task["n_ctx"]:
            self._llm.reset()
        self._follow(at, tokens + _UNTIMED, link)
        given = self._random(at, tokens + _UNTIMED)
        for token in given[:_UNTIMED]:
            self._compute([token])
        before, times = self._counts(), []
        end = time.perf_counter() + seconds
        for token in given[_UNTIMED:]:
            times.append(self._compute([token]))
            if time.perf_counter() > end:
                break
        return self._grown(before) | {"times": times}

    def prefill(self, at: int, tokens: int, link: int) -> dict[str, Any]:
        """A prompt from an empty context."""
        self._llm.reset()
        self._follow(at, tokens, link)
        prompt = self._random(at, tokens)
        before = self._counts()
        seconds = self._compute(prompt)
        return self._grown(before) | {"times": [seconds], "tokens": tokens}

    def logits(self, windows: list[list[list[int]]], keep: int, path: str) -> dict[str, Any]:
        """Compute texts, each given as its steps, with all their logits, for which it must have been loaded. Writes
        those of the first tokens, float32 [keep, vocabulary]; returns the losses of all that were foretold: minus the
        natural logarithm of their probability."""
        before = self._counts()
        kept, losses = np.empty((keep, self._llm.n_vocab()), np.float32), []
        n = 0
        for steps in windows:
            self._llm.reset()
            following = [token for step in steps for token in step][1:]
            for step in steps:
                at = self._llm.n_tokens
                self._llm.eval(step)
                pointer = self._llm._ctx.get_logits()
                rows = np.ctypeslib.as_array(pointer, (len(step), kept.shape[1]))
                kept[n : n + len(step)] = rows[: max(0, keep - n)]
                n += len(step)
                losses += [_loss(row, token) for row, token in zip(rows, following[at:], strict=False)]
        np.save(path, kept)
        return self._grown(before) | {"losses": losses}

    def text(self, tokens: int) -> dict[str, Any]:
        """Token ids of prose."""
        from passages import passages

        return {"ids": passages(self._llm.tokenize, 1, tokens, 1)[0], "n_vocab": self._llm.n_vocab()}

    def budget(self, vram: str) -> dict[str, Any]:
        """Change the VRAM budget."""
        self._llm.set_vram_budget(vram)
        return {"slots": self._native.stats()["slots"]}

    def another_context(self, n_ctx: int) -> dict[str, Any]:
        """Load the model once more, with a longer context."""
        other = gpu_rows.load(self._row, self._task | {"n_ctx": n_ctx, "logits_all": False})
        try:
            other.eval(self._random(0, 64))
            return {"slots": other.engine.native.stats()["slots"]}
        finally:
            other.close()

    # ---- how

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"load_s": self.load_s, "n_vocab": self._llm.n_vocab()}
        if self._native is not None:
            info, stats = self._native.info, self._native.stats()
            facts |= {
                "expert_mb": info.expert_bytes / info.n_experts_total / 1e6,
                "slots": stats["slots"],
                "ram_slots": stats["ram_slots"],
            }
        return facts

    def _random(self, seed: int, n: int) -> list[int]:
        most = min(30000, self._llm.n_vocab() - 1)
        return [int(t) for t in np.random.default_rng(seed).integers(min(300, most // 2), most, n)]

    def _compute(self, tokens: list[int]) -> float:
        """Seconds that it took."""
        start = time.perf_counter()
        self._llm.eval(tokens)
        llama_cpp.llama_synchronize(self._llm._ctx.ctx)
        return time.perf_counter() - start

    def _follow(self, at: int, n: int, link: int) -> None:
        """The next n tokens' experts come from the trace, if there is one, from its token `at` on."""
        if self._native is None:
            return
        self._native.set_link_limit(link)
        if self._ids is not None:
            which = (at + np.arange(n)) % len(self._ids)
            self._native.set_replay(self._ids[which].astype(np.int32))

    def _counts(self) -> dict[str, int]:
        return {} if self._native is None else self._native.stats()

    def _grown(self, before: dict[str, int]) -> dict[str, Any]:
        if self._native is None:
            return {}
        after = self._native.stats()
        grown: dict[str, Any] = {name: after[name] - before[name] for name in COUNTERS if name in after}
        return grown | {"policy": self._llm.engine.policy, "slots": after["slots"]}


def _loss(row: np.ndarray[Any, np.dtype[np.float32]], token: int) -> float:
    most = row.max()
    return float(np.log(np.exp(row - most).sum(dtype=np.float64)) + most - row[token])


class Warnings(logging.Handler):
    """What pyengine has warned of since the last answer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def take(self) -> list[str]:
        said, self.said = self.said, []
        return said


@contextlib.contextmanager
def _fresh(ours: bool) -> Iterator[None]:
    """Without what earlier processes learned of the model's routing. Stock rows import nothing of pyengine."""
    if not ours:
        yield
        return
    from pyengine.bench.child import without_profiles

    with without_profiles():
        yield


def _answered(answer: Callable[[], dict[str, Any]], warnings: Warnings) -> dict[str, Any]:
    try:
        result = answer()
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return result | {"warnings": warnings.take()}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    task = json.loads(sys.stdin.readline())
    warnings = Warnings()
    logging.getLogger("pyengine").addHandler(warnings)
    with _fresh(task["ours"]):
        made: list[Worker] = []

        def load() -> dict[str, Any]:
            made.append(Worker(task))
            return made[0].facts()

        print(json.dumps(_answered(load, warnings)), file=out, flush=True)
        for line in sys.stdin if made else ():
            request = json.loads(line)
            work = getattr(made[0], request.pop("do"))
            print(json.dumps(_answered(lambda: work(**request), warnings)), file=out, flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
