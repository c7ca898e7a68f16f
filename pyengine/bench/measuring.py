"""The phases of one sample, timed: first prompt and decode from a cold cache, prefill, then decode in the steady state.

Knows nothing of how the model was loaded: a Subject computes tokens and counts. Decoding is greedy and ends neither at
an end-of-text token nor early, except at the time limit, so that all rows compute the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Subject(Protocol):
    """A loaded model that can be measured."""

    def begin(self, text: int, tokens: int) -> None:
        """Forget what was computed; text number `text` with up to `tokens` tokens follows."""

    def eval(self, tokens: Sequence[int]) -> None:
        """Compute these tokens after those before."""

    def likeliest(self) -> int:
        """The token with the highest logit after the last one computed."""

    def counters(self) -> Mapping[str, float]:
        """Counters that only grow; names ending in _s are seconds."""


@dataclass(frozen=True)
class Texts:
    """What to compute, as token ids: short prompts for decoding, a long text for prefill."""

    prompts: Sequence[Sequence[int]]
    prefill: Sequence[int]


@dataclass
class Phase:
    """Seconds, tokens and the growth of every counter while one phase ran."""

    seconds: float = 0.0
    tokens: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    def time(self, subject: Subject, work: Callable[[], int]) -> None:
        """Add the time and counts of `work`, which returns the number of tokens it computed."""
        before = subject.counters()
        started = time.perf_counter()
        self.tokens += work()
        self.seconds += time.perf_counter() - started
        for name, value in subject.counters().items():
            self.counts[name] = self.counts.get(name, 0) + value - before[name]

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "counts": self.counts,
            "step_seconds": self.step_seconds,
        }


def measure(
    subject: Subject, texts: Texts, n_tokens: int, limit_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run every phase.

    Args:
        n_tokens: tokens to decode after each prompt.
        limit_s: end the decoding of one prompt after this many seconds, however few tokens it has given.
        say: called with the name of the phase that begins.

    Returns:
        phases (name -> Phase.as_dict(); "prompt": first prompt, to its first token; "decode_cold": the tokens after it;
        "prefill": the long text; "decode": tokens after the other prompts, or after the first one again if it is the
        only one), tokens (list of token ids for each decoded prompt).
    """
    phases = {name: Phase() for name in ("prompt", "decode_cold", "prefill", "decode")}
    answers = []
    say("prompt")
    first = list(texts.prompts[0])
    subject.begin(0, len(first) + n_tokens)
    phases["prompt"].time(subject, lambda: prefill(subject, first))
    say("decode_cold")
    answers.append(decode(subject, phases["decode_cold"], n_tokens, limit_s))
    say("prefill")
    subject.begin(len(texts.prompts), len(texts.prefill))
    phases["prefill"].time(subject, lambda: prefill(subject, texts.prefill))
    say("decode")
    for number in range(1, len(texts.prompts)) or (0,):
        prompt = list(texts.prompts[number])
        subject.begin(number, len(prompt) + n_tokens)
        prefill(subject, prompt)
        answers.append(decode(subject, phases["decode"], n_tokens, limit_s))
    return {"phases": {name: phase.as_dict() for name, phase in phases.items()}, "tokens": answers}


def prefill(subject: Subject, tokens: Sequence[int]) -> int:
    """Compute a prompt, to its end; returns its number of tokens."""
    subject.eval(tokens)
    subject.likeliest()  # the kernels may still be at work until somebody looks at a logit
    return len(tokens)


def decode(subject: Subject, phase: Phase, n_tokens: int, limit_s: float) -> list[int]:
    """`n_tokens` tokens, the first of which what was computed before has given already: the steps between them are
    timed. Fewer after `limit_s` seconds."""
    tokens = [subject.likeliest()]
    end = time.perf_counter() + limit_s

    def work() -> int:
        now = time.perf_counter()
        while len(tokens) < n_tokens and now < end:
            subject.eval(tokens[-1:])
            tokens.append(subject.likeliest())
            before, now = now, time.perf_counter()
            phase.step_seconds.append(now - before)
        return len(tokens) - 1

    phase.time(subject, work)
    return tokens
