"""The tables of the report page: speeds, movement of experts, bundles against plain files. Markdown, from summaries."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from pyengine.bench.rows import LRU, LRU_BUNDLE, STOCK_RESIDENT
from pyengine.bench.samples import Sample
from pyengine.bench.summary import BASELINES, RowSummary, ratio


def table(rows: Sequence[RowSummary], columns: Sequence[tuple[str, Callable[[RowSummary], str]]]) -> str:
    """One line for each row."""
    return markdown(
        ["row", *(name for name, _ in columns)], [[row.row, *(show(row) for _, show in columns)] for row in rows]
    )


def markdown(names: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table whose first column is flush left and whose others are flush right."""
    head = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in cells)]) + "\n"


def median(column: str, form: str = "", scale: float = 1.0) -> Callable[[RowSummary], str]:
    """A column of the samples, median over the rounds. Three significant digits unless `form` says otherwise."""

    def show(row: RowSummary) -> str:
        value = row.medians.get(column)
        if value is None:
            return ""
        value *= scale
        return (form or ("{:.0f}" if abs(value) >= 100 else "{:.3g}")).format(value)

    return show


def _ratio(baseline: str, speed: str) -> Callable[[RowSummary], str]:
    def show(row: RowSummary) -> str:
        found = row.ratios.get((baseline, speed))
        if found is None:
            return ""
        spread = f" ({found.low:.2f} .. {found.high:.2f})" if found.pairs > 1 else ""
        return f"{found.median:.2f}{spread}"

    return show


def speeds(rows: Sequence[RowSummary]) -> str:
    """Decode, prefill, load and first token of one model's rows, with ratios."""

    def decode(row: RowSummary) -> str:
        bad = ", ".join(f"{n} x {status}" for status, n in row.statuses.items() if status != "ok")
        speed = median("decode_tok_per_s")(row)
        return f"{speed} ({bad})" if speed and bad else speed or f"**{bad}**"

    present = {row.kind for row in rows}
    compared = [
        (f"/ {baseline}", _ratio(baseline, "decode_tok_per_s")) for baseline in BASELINES if baseline in present
    ]
    prefill = [("/ stock-resident", _ratio(STOCK_RESIDENT, "prefill_tok_per_s"))] if STOCK_RESIDENT in present else []
    return table(
        rows,
        [
            ("decode tok/s", decode),
            *compared,
            ("cold", median("decode_cold_tok_per_s")),
            (
                "TPOT p50 / p95 ms",
                lambda row: " / ".join(filter(None, map(_shown(row), ("tpot_p50_ms", "tpot_p95_ms")))),
            ),
            ("prefill tok/s", median("prefill_tok_per_s")),
            *prefill,
            ("load s", median("load_s", "{:.2f}")),
            ("first token s", median("ttft_s", "{:.2f}")),
            ("same tokens", lambda row: row.exact),
        ],
    )


def _shown(row: RowSummary) -> Callable[[str], str]:
    return lambda column: median(column)(row)


def movement(rows: Sequence[RowSummary]) -> str:
    """Memory, hits, reads and processor time of one model's rows."""
    return table(
        rows,
        [
            ("memory limit MB", median("limit_bytes", "{:.0f}", 1e-6)),
            ("peak MB", median("peak_group_bytes", "{:.0f}", 1e-6)),
            ("hit rate", median("hit_rate", "{:.1%}")),
            ("MB / token", median("mb_per_token")),
            ("from disk", median("disk_mb_per_token")),
            ("reads / token", median("reads_per_token")),
            ("stall", median("stall_share", "{:.0%}")),
            ("MB/s", median("bandwidth_mb_per_s", "{:.0f}")),
            ("probe MB/s", median("probe_mb_per_s", "{:.0f}")),
            ("CPU s / token", median("cpu_s_per_token")),
            ("I/O CPU ms / miss", median("io_cpu_ms_per_miss")),
        ],
    )


_BUNDLE_COLUMNS = {
    "decode_tok_per_s": "decode",
    "prefill_tok_per_s": "prefill",
    "ttft_s": "first token",
    "mb_per_token": "bytes",
    "reads_per_token": "reads",
    "io_cpu_ms_per_miss": "I/O CPU per miss",
}


def bundles(samples: Sequence[Sample], rows: Sequence[RowSummary]) -> Iterator[str]:
    """Bundle against plain GGUF at each budget, from pairs of the same round."""
    lines = []
    for row in (row for row in rows if row.kind == LRU_BUNDLE):
        mine = [s for s in samples if (s.model, s.row) == (row.model, row.row)]
        plain = [s for s in samples if (s.model, s.kind, s.share) == (row.model, LRU, row.share)]
        cells = []
        for column in (
            "decode_tok_per_s",
            "prefill_tok_per_s",
            "ttft_s",
            "mb_per_token",
            "reads_per_token",
            "io_cpu_ms_per_miss",
        ):
            found = ratio(mine, plain, column)
            cells.append(f"{found.median:.2f}" if found else "")
        if any(cells):
            lines.append(f"| {row.share:g} % | " + " | ".join(cells) + " |")
    if lines:
        names = _BUNDLE_COLUMNS.values()
        yield "Bundle / plain GGUF file:\n"
        yield "\n".join(["| budget | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names), *lines]) + "\n"


def forecasts(samples: Sequence[Sample]) -> Iterator[str]:
    """What the planner said of each row right before it ran, against what it was; one model's samples."""
    by_row: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.status == "ok" and sample.plan_decode_tok_per_s:
            by_row.setdefault(sample.row, []).append(sample)
    if not by_row:
        return
    # Alternately with the trace of these texts and without any.
    pairs = [
        (f"{who}_{speed}", speed) for speed in ("decode_tok_per_s", "prefill_tok_per_s") for who in ("plan", "guess")
    ]
    largest = dict.fromkeys((said for said, _ in pairs), 0.0)
    lines = []
    for row, group in by_row.items():
        cells = [f"{statistics.median(100 * (s.hit_rate or 0) for s in group):.0f} %"]
        cells.append(f"{statistics.median(100 * (s.plan_hit_rate or 0) for s in group):.0f} %")
        for said, speed in pairs:
            errors = [getattr(s, said) / getattr(s, speed) - 1 for s in group]
            largest[said] = max(largest[said], *map(abs, errors))
            cells.append(" ".join(f"{error:+.0%}" for error in errors))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    names = ["hits", "foretold", "decode", "without a trace", "prefill", "without a trace"]
    yield "What `pyengine plan` foretold right before each sample, against the sample (each round's error):\n"
    yield "\n".join(["| row | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names), *lines]) + "\n"
    worst = [f"{largest[said]:.0%}" for said, _ in pairs]
    yield f"Largest error: decode {worst[0]}, without a trace {worst[1]}; prefill {worst[2]} and {worst[3]}.\n"
