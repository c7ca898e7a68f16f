"""One cell of prompt_lengths.py: load the model as a row of `pyengine bench` does, compute a prompt piece by piece,
print one line of JSON."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from passages import passages

from pyengine.bench.child import PR_SET_PDEATHSIG, LoadedModel, Task, load, loaded_libraries, n_ctx_of, without_profiles

#: llama.cpp's micro-batch: it computes no more at once, whatever it is given.
PIECE = 512


def ends_of(lengths: Sequence[int]) -> list[int]:
    """Where pieces of a prompt end: after every micro-batch, and at the lengths that are asked for."""
    return sorted({*lengths, *range(PIECE, max(lengths), PIECE)})


def run(task: Task, lengths: Sequence[int], seed: int) -> dict[str, Any]:
    """Load, compute, count.

    Returns:
        marks: after each piece {"tokens", "seconds", "next": the likeliest next token, "counts"}, all from the prompt's
        beginning; cut: whether there was no time for the rest.
    """
    started = time.perf_counter()
    llm = load(task, n_ctx_of(task))
    load_s = time.perf_counter() - started
    with contextlib.closing(llm):
        print("prompt", file=sys.stderr, flush=True)
        (tokens,) = passages(llm.tokenize, 1, task.prefill_tokens, seed)
        subject = LoadedModel(llm, None)
        subject.begin(0, len(tokens))
        before, marks, done = subject.counters(), [], 0
        started = time.perf_counter()
        for end in ends_of(lengths):
            subject.eval(tokens[done:end])
            best = subject.likeliest()  # the kernels may still be at work until somebody looks at a logit
            seconds, done = time.perf_counter() - started, end
            counts = {name: value - before.get(name, 0) for name, value in subject.counters().items()}
            marks.append({"tokens": end, "seconds": seconds, "next": best, "counts": counts})
            if seconds >= task.limit_s:
                break
        return {
            "status": "ok",
            "cut": done < len(tokens),
            "load_s": load_s,
            "marks": marks,
            "libraries": loaded_libraries(),
        }


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.load(sys.stdin)
    try:
        with without_profiles():
            result = run(Task(**job["task"]), job["lengths"], job["seed"])
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
