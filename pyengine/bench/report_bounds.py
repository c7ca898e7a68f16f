"""Tables of the report page about one model's rows: auto beside its bound, the bandwidth that would be needed, and the
ablation. Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pyengine.bench.bounds import HITS, WAITING, Bound, bounds
from pyengine.bench.report_tables import markdown, median, table
from pyengine.bench.rows import ABLATION
from pyengine.bench.samples import Sample
from pyengine.bench.summary import RowSummary, ratio


def bound_tables(samples: Sequence[Sample], facts: Mapping[str, Any]) -> Iterator[str]:
    """Both tables of bounds, medians over the rounds; nothing without rounds that have what they take.

    Args:
        samples: of one model; facts: of it, from the record.
    """
    by_share: dict[float, list[Bound]] = {}
    for bound in bounds(samples, facts):
        by_share.setdefault(bound.share, []).append(bound)
    if not by_share:
        return
    yield (
        "The bound beside each figure of `auto`: a token cannot take less than max(T, M e / b), where T is the time of "
        "stock-resident in the same round, M the misses per token of decayed LFU that fetches nothing ahead "
        "(`lfu-bundle`, same round), e the bytes of an expert and b the bandwidth that the disk probe found right "
        "before:\n"
    )
    yield markdown(
        ("budget", "auto tok/s", "bound tok/s", "reached", "T ms", "M e / b ms"),
        [
            (
                f"{share:g} %",
                f"{_middle(mine, 'tok_per_s'):.3g}",
                f"{_middle(mine, 'bound_tok_per_s'):.3g}",
                f"{_middle(mine, 'reached'):.2f}",
                f"{_middle(mine, 'compute_ms'):.0f}",
                f"{_middle(mine, 'read_ms'):.0f}",
            )
            for share, mine in sorted(by_share.items())
        ],
    )
    yield (
        f"The bandwidth at which at least {HITS:.0%} of the accesses find their expert there (resident, or fetched "
        f"ahead in time) and at most {WAITING:.0%} of the time is waiting: of M missing experts, x may come late. The "
        "others must fit under computing, (M - x) e / b <= T; the late ones are waited for, x e / b <= T 5 / 95; and "
        "of A accesses per token at most 1 % are late, x <= A / 100. So b = (M - x) e / T with "
        "x = min(M / 20, A / 100), if every guess were right and early enough and reads spread evenly over the "
        "layers:\n"
    )
    yield markdown(
        ("budget", "bandwidth needed GB/s", "the disk's GB/s", "allowed here", "hit rate", "waiting"),
        [
            (
                f"{share:g} %",
                f"{_middle(mine, 'needed_bytes_per_s') / 1e9:.2f}",
                f"{_middle(mine, 'probe_bytes_per_s') / 1e9:.2f}",
                "yes" if all(b.needed_bytes_per_s <= b.probe_bytes_per_s for b in mine) else "no",
                _share(mine, "hit_rate"),
                _share(mine, "stall_share"),
            )
            for share, mine in sorted(by_share.items())
        ],
    )


def _middle(found: Sequence[Bound], name: str) -> float:
    return float(statistics.median(getattr(bound, name) for bound in found))


def _share(found: Sequence[Bound], name: str) -> str:
    known = [value for bound in found if (value := getattr(bound, name)) is not None]
    return f"{statistics.median(known):.1%}" if known else ""


def ablation(rows: Sequence[RowSummary], samples: Sequence[Sample], facts: Mapping[str, Any]) -> Iterator[str]:
    """A table for each budget; nothing without rows of an ablation.

    Args:
        rows, samples: of one model; facts: of it, from the record.
    """
    accesses = facts["n_layer"] * facts["n_expert_used"]
    for share in sorted({row.share for row in rows if row.kind in ABLATION and row.share is not None}):
        mine = sorted(
            (row for row in rows if row.kind in ABLATION and row.share == share),
            key=lambda row: list(ABLATION).index(row.kind),
        )
        taken = {row.row: [sample for sample in samples if sample.row == row.row] for row in mine}
        measured = [row.row for row in mine if "decode_tok_per_s" in row.medians]
        yield f"Ablation at {share:g} %, each row with one thing more than the one before:\n"
        yield table(
            mine,
            [
                ("decode tok/s", lambda row: median("decode_tok_per_s")(row) or f"**{', '.join(row.statuses)}**"),
                ("/ the one before", _against(taken, measured, lambda names, at: names[at - 1])),
                ("/ the first", _against(taken, measured, lambda names, _: names[0])),
                ("resident", _rate(accesses, lambda m: m["hit_rate"] * accesses - m.get("prefetch_hits_per_token", 0))),
                ("in time", _rate(accesses, lambda m: m.get("prefetch_hits_per_token", 0))),
                ("late", _rate(accesses, lambda m: m.get("prefetches_late_per_token", 0))),
                (
                    "miss",
                    _rate(accesses, lambda m: m["misses_per_token"] - m.get("prefetches_late_per_token", 0)),
                ),
                ("MB / token", median("mb_per_token")),
                ("wasted prefetches / token", median("prefetches_wasted_per_token")),
                ("waiting", median("stall_share", "{:.0%}")),
                ("same tokens", lambda row: row.exact),
            ],
        )


def _against(
    taken: Mapping[str, Sequence[Sample]], measured: Sequence[str], which: Callable[[Sequence[str], int], str]
) -> Callable[[RowSummary], str]:
    """Decoding against another row of the ablation, from pairs of the same round; rows not measured are passed over."""

    def show(row: RowSummary) -> str:
        at = measured.index(row.row) if row.row in measured else 0
        found = ratio(taken[row.row], taken[which(measured, at)], "decode_tok_per_s") if at else None
        if found is None:
            return ""
        return f"{found.median:.2f}" + (f" ({found.low:.2f} .. {found.high:.2f})" if found.pairs > 1 else "")

    return show


def _rate(accesses: int, count: Callable[[Mapping[str, float]], float]) -> Callable[[RowSummary], str]:
    def show(row: RowSummary) -> str:
        return f"{count(row.medians) / accesses:.1%}" if "hit_rate" in row.medians else ""

    return show
