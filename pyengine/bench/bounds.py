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
"""

from __future__ import annotations

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
