"""One sample as one line of the CSV: the figures of a child's phases under names with units, and how it came about."""

from __future__ import annotations

import csv
import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from pyengine.errors import UsageError


@dataclass(frozen=True)
class Sample:
    """A line of the CSV. None: not measured (a stock row counts no hits, a killed one nothing). An mb is 10^6 bytes,
    tok a token; "cold" figures begin with an empty cache, the others come after cold and prefill."""

    model: str
    """name of the model's file"""
    row: str
    """rows.Row.name"""
    kind: str
    share: float | None
    """budget, percent of all experts"""
    round: int
    order: int
    """place in its round, counted from 0"""
    status: str
    """launch.Outcome.status"""
    reason: str
    budget_bytes: int
    limit_bytes: int | None
    """memory control group; None: none"""
    disk_limit_mb_per_s: float | None
    replay: str
    """name of the routing trace, if expert ids come from one (then text means nothing), else empty"""
    transfer_ratio: float | None = None
    """R, time to move an expert / time to compute a layer, that the disk limit was set for; None: it was not"""
    load_s: float | None = None
    """start of loading until the model is ready"""
    ttft_s: float | None = None
    """start of loading until the first token"""
    prompt_s: float | None = None
    """of this the prompt, in cold state"""
    prefill_tok_per_s: float | None = None
    """tokens per second"""
    decode_cold_tok_per_s: float | None = None
    decode_tok_per_s: float | None = None
    decode_tokens: int | None = None
    """steps timed for decode_tok_per_s"""
    tpot_p50_ms: float | None = None
    tpot_p95_ms: float | None = None
    """time per output token; 95 of 100 are faster"""
    hit_rate: float | None = None
    """of decode; accesses whose expert was resident"""
    misses_per_token: float | None = None
    prefetches_per_token: float | None = None
    prefetch_hits_per_token: float | None = None
    prefetches_late_per_token: float | None = None
    prefetches_wasted_per_token: float | None = None
    """of decode; see pye_stats. Late ones are misses too"""
    predict_ms_per_token: float | None = None
    reads_per_token: float | None = None
    mb_per_token: float | None = None
    """of decode; what the engine asked of the disk"""
    disk_mb_per_token: float | None = None
    """of decode; what the system read from the disk for this process, page cache and read-ahead included"""
    stall_share: float | None = None
    """of decode; part of the time that kernels waited for experts"""
    bandwidth_mb_per_s: float | None = None
    """of decode; bytes read / time with at least one load under way; None if that was hardly ever"""
    probe_mb_per_s: float | None = None
    """what disk_probe got in this round with reads of this row's size"""
    cpu_s_per_token: float | None = None
    """of decode; all threads, spinning ones included"""
    io_cpu_ms_per_miss: float | None = None
    """of decode; processor time of the I/O threads"""
    peak_group_bytes: int | None = None
    """peak of the memory control group, page cache included"""
    peak_rss_bytes: int | None = None
    """peak resident set of the process, mapped pages of files included"""
    limit_reached: int | None = None
    """times the control group was at its limit"""
    other_cpu: float | None = None
    """processors' worth of other programs meanwhile"""
    stolen_cpu: float | None = None
    """processors' worth that the hypervisor took"""
    fixed_work_s: float | None = None
    """quiet.fixed_work() just before"""
    plan_decode_tok_per_s: float | None = None
    plan_prefill_tok_per_s: float | None = None
    plan_hit_rate: float | None = None
    """what `pyengine plan` said right before, with the trace of these texts"""
    guess_decode_tok_per_s: float | None = None
    guess_prefill_tok_per_s: float | None = None
    guess_hit_rate: float | None = None
    """the same before there is a trace"""
    link_mb_per_token: float | None = None
    """of decode; moved from RAM to a GPU"""
    text: str = ""
    """hash of the greedy token ids"""
    exact: str = ""
    """"yes" or "no": the same tokens as the reference row; "" where there is nothing to compare with"""


_PREFETCH = ("prefetches", "prefetch_hits", "prefetches_late", "prefetches_wasted")

#: Share of the decoding time below which so few loads were under way that their bandwidth means nothing.
_LEAST_LOADING = 0.01

COLUMNS = tuple(field.name for field in fields(Sample))
_ALWAYS = tuple(field.name for field in fields(Sample) if field.default is MISSING)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Sample from what a child printed (see child.py)."""
    phases = result["phases"]
    return {
        "load_s": result["load_s"],
        "ttft_s": result["load_s"] + phases["prompt"]["seconds"],
        "prompt_s": phases["prompt"]["seconds"],
        "prefill_tok_per_s": _rate(phases["prefill"]),
        "decode_cold_tok_per_s": _rate(phases["decode_cold"]),
        "peak_rss_bytes": result["peak_rss"],
        "text": text_hash(result["tokens"]),
        **decode_figures(phases["decode"]),
    }


def decode_figures(decode: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of Sample that one phase of decoding gives (measuring.Phase.as_dict())."""
    counts, n, steps = decode["counts"], decode["tokens"], decode["step_seconds"]
    found: dict[str, Any] = {"decode_tok_per_s": _rate(decode), "decode_tokens": n}
    if steps:
        found["tpot_p50_ms"] = 1e3 * statistics.median(steps)
        found["tpot_p95_ms"] = 1e3 * percentile(steps, 0.95)
    if n:
        found["cpu_s_per_token"] = counts["cpu_s"] / n
        if "disk_bytes" in counts:
            found["disk_mb_per_token"] = counts["disk_bytes"] / 1e6 / n
    if "hits" in counts and n:
        accesses = counts["hits"] + counts["misses"]
        found |= {
            "hit_rate": counts["hits"] / accesses if accesses else None,
            "misses_per_token": counts["misses"] / n,
            "reads_per_token": counts["reads"] / n,
            **{f"{name}_per_token": counts[name] / n for name in _PREFETCH if name in counts},
            "predict_ms_per_token": 1e3 * counts.get("predict_s", 0) / n,
            "mb_per_token": counts["bytes_read"] / 1e6 / n,
            "stall_share": counts["stall_s"] / decode["seconds"],
        }
        if counts.get("link_bytes"):
            found["link_mb_per_token"] = counts["link_bytes"] / 1e6 / n
        if counts.get("io_s", 0) > _LEAST_LOADING * decode["seconds"]:
            found["bandwidth_mb_per_s"] = counts["bytes_read"] / 1e6 / counts["io_s"]
        if "io_cpu_s" in counts and counts["misses"]:
            found["io_cpu_ms_per_miss"] = 1e3 * counts["io_cpu_s"] / counts["misses"]
    return found


def _rate(phase: Mapping[str, Any]) -> float | None:
    return phase["tokens"] / phase["seconds"] if phase["tokens"] and phase["seconds"] else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed. Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def text_hash(tokens: Sequence[Sequence[int]]) -> str:
    """A short name for token ids; equal for equal ids only."""
    return hashlib.sha256(repr([list(answer) for answer in tokens]).encode()).hexdigest()[:12]


def same_tokens(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> bool:
    """Whether two rows computed the same tokens as far as both got (a time limit may have ended one earlier)."""
    pairs = zip(one, other, strict=True)
    return all(n > 0 and list(a[:n]) == list(b[:n]) for a, b in pairs for n in [min(len(a), len(b))])


class CsvWriter:
    """Writes samples as they come, so that an interrupted benchmark keeps what it has. `goes_on`: the file has its
    heading, and samples, already."""

    def __init__(self, file: TextIO, *, goes_on: bool = False) -> None:
        self._table = csv.writer(file, lineterminator="\n")
        self._file = file
        if not goes_on:
            self._table.writerow(COLUMNS)

    def add(self, sample: Sample) -> None:
        self._table.writerow([_cell(getattr(sample, name)) for name in COLUMNS])
        self._file.flush()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a CSV.

    Raises:
        OSError: it cannot be read.
        UsageError: it is not one of ours.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return list(_samples(csv.DictReader(file)))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no benchmark result: {error}") from error


def _samples(lines: Iterable[Mapping[str, str]]) -> Iterable[Sample]:
    kinds = {field.name: str(field.type) for field in fields(Sample)}
    for line in lines:
        missing = [name for name in _ALWAYS if line.get(name) is None]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        # A column that came later was not measured then.
        yield Sample(**{name: _value(line[name], kinds[name]) for name in COLUMNS if line.get(name) is not None})


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if not text and "None" in kind:
        return None
    return int(text) if kind.startswith("int") else float(text)
