"""How a batch is getting on, and its summary, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pyengine.cli.output import console, format_bytes, format_percent, is_terminal, notice

if TYPE_CHECKING:
    from pyengine.batch import BatchSummary

#: Without a terminal, a line so often.
_PLAIN_EVERY_S = 30.0


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[BatchSummary], None]]:
    """A bar on a terminal, elsewhere a line now and then; the function takes the figures so far."""
    if not is_terminal(sys.stderr):
        yield _PlainLines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("Answering", total=None)
        yield lambda summary: bar.update(
            task, description=_state(summary), completed=summary.finished, total=summary.lines
        )


class _PlainLines:
    def __init__(self) -> None:
        self._said_at = time.monotonic()

    def __call__(self, summary: BatchSummary) -> None:
        if time.monotonic() - self._said_at >= _PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            notice(_state(summary))


def _state(summary: BatchSummary) -> str:
    """How far it is, in a few words: "12 of 100 lines, 1 failed · 34.5 tok/s"."""
    of = "" if summary.lines is None else f" of {summary.lines}"
    failed = f", {summary.failed} failed" if summary.failed else ""
    rate = summary.generated_per_s
    return f"{summary.finished}{of} lines{failed}" + ("" if rate is None else f" · {rate:.1f} tok/s")


def summary_lines(summary: BatchSummary) -> Iterator[str]:
    """The end of a batch: what became of its lines, what was computed, what the experts cost."""
    resumed = f", {summary.resumed} before this run" if summary.resumed else ""
    lines = summary.finished if summary.lines is None else summary.lines
    left = f", {lines - summary.finished} left" if lines > summary.finished else ""
    yield f"{lines} lines: {summary.done} answered, {summary.failed} failed{resumed}{left}"
    if summary.done:
        cached = f" ({format_percent(summary.cached_tokens, summary.prompt_tokens)} cached)"
        rate = summary.generated_per_s
        yield (
            f"{summary.prompt_tokens} prompt tokens{cached}, {summary.generated_tokens} generated in "
            f"{summary.seconds:.1f} s" + ("" if rate is None else f" · {rate:.1f} tok/s")
        )
    if summary.bytes_per_token is not None and summary.hits + summary.misses:
        rate_of_hits = format_percent(summary.hits, summary.hits + summary.misses)
        at_once = "" if summary.planned_step_s is not None else f" · {summary.parallel} lines at once"
        yield f"hit rate {rate_of_hits} · {format_bytes(summary.bytes_per_token)} read per token{at_once}"
    if summary.planned_step_s is not None:
        yield _planned(summary, summary.planned_step_s)


def _planned(summary: BatchSummary, planned_s: float) -> str:
    """How many lines at once, and what a step was to take and took: "8 lines at once · planned 52.1 ms a step, actual
    54.9 ms"."""
    of = "" if summary.step_lines == summary.parallel else f" of {summary.step_lines}"
    actual_s = summary.actual_step_s
    actual = "too few of them to tell the actual time" if actual_s is None else f"actual {_ms(actual_s)}"
    return f"{summary.parallel} lines at once · planned {_ms(planned_s)} a step{of}, {actual}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
