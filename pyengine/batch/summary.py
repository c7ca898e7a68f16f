"""What a batch has done: figures while it runs and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BatchSummary:
    """Counts of one run; lines that earlier runs answered are only in `lines` and `resumed`.

    Attributes:
        lines: in the input, without blank ones; None: not known, since it is read from a pipe that has not ended.
        resumed: answered by earlier runs.
        done: answered by this run.
        failed: error lines written by this run.
        prompt_tokens, cached_tokens: of finished lines; the latter were taken from kept prefixes.
        generated_tokens: of finished lines.
        running_tokens: generated so far for lines under way.
        seconds: since the first step.
        parallel: lines computed at once, at most.
        step_lines: lines of the steps that were planned for; None: nothing was planned.
        planned_step_s, actual_step_s: seconds of a step that computes a token of each of these, as planned and as it
            was (median); the latter None: there were too few of them.
        hits, misses, bytes_read: accesses to experts in this run, and what was read from disk for them.
        interrupted: it was stopped before its end.
    """

    lines: int | None = None
    resumed: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    running_tokens: int = 0
    seconds: float = 0.0
    parallel: int = 0
    step_lines: int | None = None
    planned_step_s: float | None = None
    actual_step_s: float | None = None
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    interrupted: bool = False

    @property
    def finished(self) -> int:
        """Lines with an answer, an error or not, whoever wrote it."""
        return self.resumed + self.done + self.failed

    @property
    def generated_per_s(self) -> float | None:
        """Tokens generated per second, those of lines under way among them."""
        return (self.generated_tokens + self.running_tokens) / self.seconds if self.seconds > 0 else None

    @property
    def hit_rate(self) -> float | None:
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read from disk per token computed, of prompts or answers."""
        computed = self.prompt_tokens - self.cached_tokens + self.generated_tokens
        return self.bytes_read / computed if computed else None

    def as_json(self) -> dict[str, Any]:
        """All figures, for --json."""
        rate = self.prompt_tokens / self.seconds if self.seconds > 0 else None
        figures = {name: value for name, value in asdict(self).items() if name != "running_tokens"}
        return figures | {
            "generated_tokens_per_s": self.generated_per_s,
            "prompt_tokens_per_s": rate,
            "hit_rate": self.hit_rate,
            "bytes_read_per_token": self.bytes_per_token,
        }


class ExpertAccounts:
    """What the experts did since this was made."""

    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._before = dict(stats)

    def enter(self, summary: BatchSummary, stats: Mapping[str, Any]) -> None:
        """Write the differences into the summary."""
        for name in ("hits", "misses", "bytes_read"):
            setattr(summary, name, int(stats.get(name, 0)) - int(self._before.get(name, 0)))
