"""One cell of batch_curves.py: load the model one way, let so many texts decode together, print one line of JSON."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import statistics
import sys
import time
from typing import Any

from batch_worker import Task, counters, load
from passages import passages

from pyengine.bench.child import PR_SET_PDEATHSIG, loaded_libraries, without_profiles

#: Steps of all texts that are computed before any counts, and the least that then do.
WARM_UP, LEAST = 2, 3


def run(task: Task) -> dict[str, Any]:
    """Load, compute all prompts, and time the steps in which every text decodes and nothing else is computed, until
    these have taken task.seconds."""
    from pyengine.sessions import Request, SamplingParams, Scheduler, SessionState

    assert task.n is not None
    started = time.perf_counter()
    llm = load(task)
    load_s = time.perf_counter() - started
    with contextlib.closing(llm):
        print("decode", file=sys.stderr, flush=True)
        prompts = passages(llm.tokenize, task.n, task.prompt_tokens, task.seed)
        sampling = SamplingParams(max_tokens=task.answer_tokens, temperature=0, ignore_eos=True)
        before: dict[str, float] = {}
        steps: list[float] = []
        n_warm, begun = 0, time.perf_counter()
        prompts_s = 0.0
        with Scheduler(llm, max_sequences=task.n, prompt_chunk=llm.n_batch) as scheduler:
            sessions = [scheduler.submit(Request(tokens, sampling)) for tokens in prompts]
            while not scheduler.idle and (sum(steps) < task.seconds or len(steps) < LEAST):
                together = all(one.state is SessionState.DECODING for one in sessions)
                if together and n_warm == WARM_UP and not before:
                    before = counters(llm)
                started = time.perf_counter()
                scheduler.step()
                took = time.perf_counter() - started
                if not together:
                    prompts_s = time.perf_counter() - begun
                    continue
                if n_warm < WARM_UP:
                    n_warm += 1
                else:
                    steps.append(took)
            after = counters(llm)
        for one in sessions:
            if one.error is not None:
                raise one.error
        if len(steps) < LEAST:
            raise RuntimeError("answers are too short: they end before enough steps were seen")
        return {
            "status": "ok",
            "n": task.n,
            "load_s": load_s,
            "prompts_s": prompts_s,
            "steps": len(steps),
            "seconds": sum(steps),
            "step_s": statistics.median(steps),
            "counts": {name: value - before.get(name, 0) for name, value in after.items()},
            "libraries": loaded_libraries(),
        }


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = Task(**json.load(sys.stdin))
    try:
        with without_profiles():
            result = run(task)
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
