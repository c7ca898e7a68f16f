"""What a disk and a processor allow: the bound beside each figure of auto, and the bandwidth that would be needed.

The bound of a token's time is max(T, M * e / b):
    T  seconds that stock-resident takes for a token, in the same round: all computing, no waiting
    M  misses of decayed LFU per token (row lfu-bundle of the same budget and round, nothing fetched ahead)
    e  bytes of an expert's record; b: what the disk probe gave right before the sample, bytes per second

The bandwidth needed for a hit rate of at least 99 % and waiting of at most 5 % of the time, with A accesses per token
(layers x experts used): let x of the M missing experts come late, the others ahead of time. Those ahead must fit under
computing, (M - x) e / b <= T; the late ones are waited for, x e / b <= T * 5 / 95; and hits allow x <= A / 100.
The most lateness that helps is x = min(M / 20, A / 100), so that b = (M - x) e / T. This takes every guess to be right
and made early enough, and reads spread evenly over the layers: a bound again, not a forecast.

The ceiling of a contest's cell: no scheme decodes a token in less than max(T, B * e / b), B the misses of Belady with
the same slots on the same texts, because whoever fetches ahead must read them all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.bench.rows import AUTO, LFU_BUNDLE, STOCK_RESIDENT
from pyengine.bench.samples import Sample

#: Wanted: hits, and the share of the time that may be waiting.
HITS, WAITING = 0.99, 0.05


@dataclass(frozen=True)
class Bound:
    """One sample of auto against its bound.

    Attributes:
        share: budget, percent; round: of the sample.
        tok_per_s: measured; bound_tok_per_s: what machine and policy allow.
        compute_ms, read_ms: T and M * e / b, per token.
        needed_bytes_per_s, probe_bytes_per_s: the bandwidth needed, see the module; the disk's.
        hit_rate: resident or in time, measured; stall_share: waiting, measured.
    """

    share: float
    round: int
    tok_per_s: float
    bound_tok_per_s: float
    compute_ms: float
    read_ms: float
    needed_bytes_per_s: float
    probe_bytes_per_s: float
    hit_rate: float | None
    stall_share: float | None

    @property
    def reached(self) -> float:
        """Share of the bound."""
        return self.tok_per_s / self.bound_tok_per_s


def needed_bandwidth(misses: float, accesses: float, record_bytes: float, compute_s: float) -> float:
    """Bytes per second, see the module. misses, accesses: per token; compute_s: of a token."""
    late = min(WAITING * misses, (1 - HITS) * accesses)
    return (misses - late) * record_bytes / compute_s


@dataclass(frozen=True)
class LeastTime:
    """Seconds per token that no scheme can do without, in one cell of a contest: compute_s, T of stock-resident;
    read_s, B * e / b."""

    compute_s: float
    read_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.read_s)

    def ceiling(self, tok_per_s: float) -> float:
        """The most that any scheme's speed can be over a baseline's."""
        return 1 / tok_per_s / self.seconds


def least_time(cell: Sequence[Sample], samples: Sequence[Sample], record: Mapping[str, Any]) -> LeastTime | None:
    """None without a turn of stock-resident, or where nothing is known of Belady's misses.

    Args:
        cell: the samples of one cell; its bandwidth is the lower one of the disk's limit and of what the disk gave
            (medians).
        samples: all of the run.
        record: of the run: models, and belady as belady_misses.record_misses() returns it.
    """
    model, share = cell[0].model, cell[0].share
    speeds = [s.decode_tok_per_s for s in samples if s.model == model and s.kind == STOCK_RESIDENT]
    resident = [speed for speed in speeds if speed]
    misses = [m["misses_per_token"] for m in record.get("belady", ()) if (m["model"], m["share"]) == (model, share)]
    limits = [s.disk_limit_mb_per_s for s in cell if s.disk_limit_mb_per_s]
    probes = [s.probe_mb_per_s for s in cell if s.probe_mb_per_s]
    known = [statistics.median(found) for found in (limits, probes) if found]
    if not resident or not misses or not known:
        return None
    facts = next(facts for facts in record["models"] if facts["name"] == model)
    return LeastTime(1 / statistics.median(resident), misses[0] * facts["record_bytes"] / (1e6 * min(known)))


def bounds(samples: Sequence[Sample], facts: Mapping[str, Any]) -> Iterator[Bound]:
    """A bound for each sample of auto whose round has what it takes.

    Args:
        samples: of one model.
        facts: of it, from the record: record_bytes, n_layer, n_expert_used.
    """
    ok = [sample for sample in samples if sample.status == "ok"]
    resident = {s.round: s.decode_tok_per_s for s in ok if s.kind == STOCK_RESIDENT}
    missed = {(s.round, s.share): s.misses_per_token for s in ok if s.kind == LFU_BUNDLE}
    for sample in ok:
        speed, misses = resident.get(sample.round), missed.get((sample.round, sample.share))
        if sample.kind != AUTO or sample.share is None or not sample.decode_tok_per_s:
            continue
        if not speed or misses is None or not sample.probe_mb_per_s:
            continue
        compute_s, disk = 1 / speed, 1e6 * sample.probe_mb_per_s
        read_s = misses * facts["record_bytes"] / disk
        accesses = facts["n_layer"] * facts["n_expert_used"]
        yield Bound(
            share=sample.share,
            round=sample.round,
            tok_per_s=sample.decode_tok_per_s,
            bound_tok_per_s=1 / max(compute_s, read_s),
            compute_ms=1e3 * compute_s,
            read_ms=1e3 * read_s,
            needed_bytes_per_s=needed_bandwidth(misses, accesses, facts["record_bytes"], compute_s),
            probe_bytes_per_s=disk,
            hit_rate=sample.hit_rate,
            stall_share=sample.stall_share,
        )
