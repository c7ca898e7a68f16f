"""The summary as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.bench.rows import (
    GPU_ON_DEMAND,
    ON_DEMAND,
    STOCK_GPU,
    STOCK_GPU_SPLIT,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
)
from pyengine.bench.summary import RowSummary

if TYPE_CHECKING:
    from rich.table import Table

_BASELINES = {
    STOCK_RESIDENT: "x resident",
    STOCK_MMAP_PLAIN: "x mmap",
    ON_DEMAND: "x on-demand",
    STOCK_GPU: "x stock",
    STOCK_GPU_SPLIT: "x split",
    GPU_ON_DEMAND: "x on-demand",
}

#: Heading -> column of the samples, and how to show it.
_REST = {
    "prefill": ("prefill_tok_per_s", "{:.3g}"),
    "first s": ("ttft_s", "{:.2f}"),
    "hits": ("hit_rate", "{:.0%}"),
}


#: launch.Outcome.status in a narrow column.
_SHORT = {"out of memory": "OOM", "timed out": "late", "not limited": "no cgroup", "unsupported": "n/a"}


def speed_tables(rows: Sequence[RowSummary]) -> list[Table]:
    """One table for each model: medians of decode and prefill in tokens/s, of the time to the first token, and decoding
    against the baselines."""
    return [
        _table(name, [row for row in rows if row.model == name]) for name in dict.fromkeys(row.model for row in rows)
    ]


def _table(model: str, rows: Sequence[RowSummary]) -> Table:
    from rich.table import Table

    table = Table(title=model, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("row", no_wrap=True)
    present = {row.kind for row in rows}
    baselines = {kind: heading for kind, heading in _BASELINES.items() if kind in present}
    for heading in ("decode", *baselines.values(), *_REST, "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        measured = "decode_tok_per_s" in row.medians
        ratios = [row.ratios.get((baseline, "decode_tok_per_s")) for baseline in baselines]
        table.add_row(
            row.row,
            f"{row.medians['decode_tok_per_s']:.3g}"
            if measured
            else "/".join(_SHORT.get(status, status) for status in row.statuses),
            *(f"{found.median:.2f}" if found else "" for found in ratios),
            *(_shown(row, column, form) for column, form in _REST.values()),
            row.exact,
        )
    return table


def _shown(row: RowSummary, column: str, form: str) -> str:
    value = row.medians.get(column)
    return "" if value is None else form.format(value)
