"""A way to run a model that stays loaded and decodes when it is its turn. Run by players.py as `python -m
pyengine.bench.player_child`.

Standard input: a Task (child.py) as a line of JSON, then for each turn a line {"steps": n, "limit_s": seconds, "text":
the number of one that is to begin, or null}, until it ends. Standard output: one line of JSON for each of them:
{"status", "reason", "libraries", "budget": bytes of slots} once loaded, then {"text": its number, "tokens": token ids,
"phase": measuring.Phase.as_dict()}.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyengine.bench.child import (
    PR_SET_PDEATHSIG,
    LoadedModel,
    Task,
    UnsupportedError,
    load,
    loaded_libraries,
    n_ctx_of,
    texts_of,
    without_profiles,
)
from pyengine.bench.measuring import Phase, Subject, decode, prefill
from pyengine.bench.replay_trace import TraceTexts
from pyengine.errors import one_line


class Text:
    """Decoding that goes on from turn to turn; at the context's end the next prompt begins, which is not timed."""

    def __init__(self, subject: Subject, prompts: Sequence[Sequence[int]], n_ctx: int) -> None:
        self._subject, self._prompts, self._n_ctx = subject, prompts, n_ctx
        self._number = -1
        self._room = 0

    def turn(self, steps: int, limit_s: float, text: int | None = None) -> dict[str, Any]:
        """`steps` more tokens, fewer after `limit_s` seconds. Always at least one. `text`: the number of one that is to
        begin."""
        if text is not None or self._room < steps:
            self._begin(self._number + 1 if text is None else text)
        phase = Phase()
        tokens = decode(self._subject, phase, min(steps, self._room) + 1, limit_s)
        self._room -= phase.tokens
        # The last one is computed by the next turn's first step.
        return {"text": self._number, "tokens": tokens[:-1], "phase": phase.as_dict()}

    def _begin(self, number: int) -> None:
        self._number = number
        place = number % len(self._prompts)
        prompt = list(self._prompts[place])
        self._subject.begin(place, self._n_ctx)
        prefill(self._subject, prompt)
        self._room = self._n_ctx - len(prompt) - 1


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def play(task: Task) -> None:
    """Load, then answer each line with a turn. Raises UnsupportedError, and whatever llama_cpp and pyengine raise."""
    replay = TraceTexts(Path(task.trace), task.n_prompts) if task.trace else None
    n_ctx = n_ctx_of(task)
    llm = load(task, n_ctx)
    try:
        texts = replay.texts(task.prefill_tokens, llm.n_vocab()) if replay else texts_of(llm, task)
        text = Text(LoadedModel(llm, replay), texts.prompts, n_ctx)
        budget = 0 if task.kind.startswith("stock") else llm.expert_stats()["budget_bytes"]
        say({"status": "ok", "reason": "", "libraries": loaded_libraries(), "budget": budget})
        for line in sys.stdin:
            say(text.turn(**json.loads(line)))
    finally:
        llm.close()


def main() -> None:
    """Load, then play until standard input ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing of a benchmark outlives it
    task = Task(**json.loads(sys.stdin.readline()))
    try:
        with without_profiles():
            play(task)
    except UnsupportedError as reason:
        say({"status": "unsupported", "reason": str(reason)})
    except Exception as error:
        say({"status": "failed", "reason": f"{type(error).__name__}: {one_line(str(error))}"})


if __name__ == "__main__":
    main()
