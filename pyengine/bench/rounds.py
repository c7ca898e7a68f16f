"""The benchmark itself: rounds in which every row of every model gets one sample, each from a cold cache."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyengine.bench import quiet
from pyengine.bench.cgroups import remove_leftovers
from pyengine.bench.rows import GPU, STOCK_MMAP_PLAIN, plan_rows
from pyengine.bench.samples import Sample
from pyengine.bench.sampling import BenchModel, Sampler
from pyengine.bench.settings import Settings


def take_samples(
    models: Sequence[BenchModel], settings: Settings, sampler: Sampler, say: Callable[[str], None]
) -> Iterator[Sample]:
    """Every sample as it is taken.

    Args:
        say: told one line per sample.

    Raises:
        UsageError: a row or budget that a model cannot have.
        CgroupError: the disk cannot be limited as asked.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the present child has ended and its control groups are gone.
    """
    plan = [(model, plan_rows(model.facts, settings.kinds, settings.shares)) for model in models]
    remove_leftovers()
    for model in models:
        sampler.check_disk_limit(model)
    n_total = settings.rounds * sum(len(rows) for _, rows in plan)
    n_done = 0
    with sigterm_as_interrupt():
        for number in range(settings.rounds):
            quiet.touch_memory(max(row.limit or model.facts.file_bytes for model, rows in plan for row in rows))
            for model, rows in plan:
                for order, row in enumerate(rows):
                    sample = sampler.take(model, row, number, order)
                    n_done += 1
                    say(f"[{n_done}/{n_total}] {describe(sample)}")
                    yield sample


def describe(sample: Sample) -> str:
    """One line about a sample for the person who waits."""
    head = f"round {sample.round + 1}, {sample.model}, {sample.row}"
    if sample.status != "ok":
        return f"{head}: {sample.status} ({sample.reason})"
    hits = "" if sample.hit_rate is None else f", hits {sample.hit_rate:.0%}"
    other = "other kernels, other tokens" if sample.kind in (STOCK_MMAP_PLAIN, *GPU) else "DIFFERENT TOKENS"
    wrong = f", {other}" if sample.exact == "no" else ""
    lack = f", {sample.reason}" if sample.reason else ""
    return (
        f"{head}: decode {sample.decode_tok_per_s or 0:.3g} tok/s, prefill {sample.prefill_tok_per_s or 0:.3g} tok/s, "
        f"first token after {sample.ttft_s:.2f} s{hits}{wrong}{lack}"
    )


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """A polite kill cleans up like Ctrl-C."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
