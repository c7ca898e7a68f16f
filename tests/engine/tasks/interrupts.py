"""Writing and loading until Ctrl-C."""

from __future__ import annotations

import contextlib
from typing import Any

from pyengine import Llama

from ..reference import write


def interrupted(path: str, ram_budget: str, prompt: list[int], n_new: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Write tokens again and again until Ctrl-C, five times; then write them once more. Says "writing" each time it
    starts."""
    rounds = 0
    with contextlib.closing(Llama(path, ram_budget=ram_budget, **settings)) as llama:
        for _ in range(5):
            print("writing", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    for _ in write(llama, prompt, n_new):
                        pass
                    llama.reset()
            rounds += 1
        return {"rounds": rounds, "tokens": list(write(llama, prompt, n_new))}


def load_over_and_over(path: str) -> dict[str, Any]:
    """Load a model until something stops it. Says "loading" when it starts."""
    print("loading", flush=True)
    while True:
        with contextlib.closing(Llama(path, n_ctx=64)) as llama:
            llama.eval([1, 2, 3])
