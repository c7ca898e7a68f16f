"""What the figures look like."""

from __future__ import annotations

import pytest
from rich.console import Console

from pyengine.cli.conversation import Figures
from pyengine.cli.output import format_bytes, format_percent, stats_table, status_line


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.977 KiB"),
        (497664, "486 KiB"),
        (31352832, "29.9 MiB"),
        (2**31, "2 GiB"),
        (5 * 2**40, "5 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes(count, shown):
    assert format_bytes(count) == shown


def test_percent():
    assert [format_percent(5, 6), format_percent(1, 2), format_percent(3, 3), format_percent(0, 0)] == [
        "83.3 %",
        "50 %",
        "100 %",
        "-",
    ]


def test_status_line_fits_80_columns_at_its_longest_usual():
    stats = {"experts": 6144, "resident": 768}
    line = status_line(Figures(2048, 1.234, 123.456, 999, 1001, 100, 4096, stats))
    assert line == "2048 tokens · 1.2 tok/s · first token 123.46 s · hit rate 50 % · resident 12.5 %"
    assert len(line) <= 80


def test_status_line_mentions_a_context_more_than_half_full():
    assert "context" not in status_line(Figures(tokens=1, context_used=2048, context_size=4096))
    assert status_line(Figures(tokens=1, context_used=3072, context_size=4096)) == "1 token · context 75 %"


def test_no_hit_rate_without_accesses():
    stats = {"managed": True, "experts": 4, "resident": 4}
    assert "hit rate - · resident 100 %" in status_line(Figures(stats=stats, context_size=9))


def test_stats_table_shows_known_figures_first_and_every_other():
    stats = {
        "managed": True,
        "tier": "disk",
        "hits": 75,
        "misses": 25,
        "hit_rate": 0.75,
        "bytes_read": 2048,
        "reads": 3,
        "stall_seconds": 1.5,
        "compute_seconds": 2.25,
        "resident_bytes": 4096,
        "slots": 8,
        "experts": 16,
        "resident": 4,
        "budget_bytes": 8192,
        "expert_used_bytes": 1024 * 50,
        "load_seconds": 0.25,
        "least_budget": 2048,
    }
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(stats_table(stats))
    assert [" ".join(row.split()) for row in capture.get().splitlines()] == [
        "resident 4 of 16 experts (25 %), 4 KiB",
        "budget 8 KiB, 8 slots",
        "hit rate 75 % (75 hits, 25 misses)",
        "read from disk 2 KiB in 3 reads",
        "waited for disk 1.50 s",
        "computed experts 2.25 s",
        "tier disk",
        "expert used bytes 50 KiB",
        "load seconds 0.25 s",
        "least budget 2 KiB",
    ]
    assert stats["hits"] == 75  # the caller's dictionary is not consumed
