"""Which rows a benchmark has, with which budget and memory limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyengine.bench.rows import ALLOWANCE, KINDS, plan_rows
from pyengine.errors import UsageError


def test_all_rows_of_a_model(facts):
    rows = plan_rows(facts)
    shares = ("12.5%", "25%", "50%", "75%", "100%")
    assert [row.name for row in rows] == [
        "stock-resident",
        "stock-mmap",
        "stock-mmap-plain",
        "on-demand",
        *(f"{kind} {share}" for kind in ("lru", "lru-bundle", "lfu-bundle", "auto") for share in shares),
    ]
    assert {row.kind for row in rows} == set(KINDS)


def test_limit_is_budget_and_other_weights_and_allowance(facts):
    limits = {row.name: row.limit for row in plan_rows(facts)}
    assert limits["stock-resident"] is None
    assert limits["lru 25%"] == 20_000_000 + 20_000_000 + ALLOWANCE
    assert limits["lru-bundle 25%"] == limits["lru 25%"]
    # The memory-mapped rows have what the 50 % row has.
    assert limits["stock-mmap"] == limits["stock-mmap-plain"] == limits["lru 50%"]


def test_a_huge_vocabulary_gets_room_to_be_loaded(facts):
    [row] = plan_rows(replace(facts, largest_other=600_000_000), ["on-demand"])
    assert row.limit == row.budget + facts.other_bytes + 600_000_000 + ALLOWANCE // 2


def test_on_demand_has_slots_for_one_layer(facts):
    [row] = plan_rows(facts, ["on-demand"])
    assert row.budget == facts.n_expert_used * 1_000_000


def test_on_demand_of_a_tiny_model_is_not_above_all_slots(facts):
    [row] = plan_rows(replace(facts, slot_bytes=1_500_000), ["on-demand"])
    assert row.budget == 1_500_000


def test_stock_resident_comes_first_however_rows_are_named(facts):
    rows = plan_rows(facts, ["lru", "stock-resident"], [50])
    assert [row.name for row in rows] == ["stock-resident", "lru 50%"]


@pytest.mark.parametrize(
    ("kinds", "shares", "message"),
    [
        (["lru", "fast"], [50], "there is no row 'fast'"),
        (["lru"], [0], "0 % is not above 0"),
        (["lru"], [101], "101 % is not above 0 and at most 100"),
        (["lru"], [1], "below the least that toy.gguf needs, 1.2 %"),
    ],
)
def test_impossible_rows_are_refused(facts, kinds, shares, message):
    with pytest.raises(UsageError, match=message):
        plan_rows(facts, kinds, shares)


def test_read_sizes_are_whole_pages(facts):
    assert facts.record_bytes == 1_003_520  # 245 pages
    assert facts.matrix_bytes == 335_872
    assert replace(facts, n_matrix=2).matrix_bytes == 503_808
