"""The bound beside auto, the bandwidth needed, and the ablation's table."""

from __future__ import annotations

import pytest

from pyengine.bench.bounds import bounds, needed_bandwidth
from pyengine.bench.report_bounds import ablation, bound_tables
from pyengine.bench.rows import ABLATION, ADVICE, ALL_KINDS, BUNDLED, expand, plan_rows
from pyengine.bench.summary import summarise

#: 200 accesses a token.
SHAPE = {"n_layer": 10, "n_expert_used": 20, "record_bytes": 1_000_000}


@pytest.fixture
def round_of(sample):
    def taken(number, auto, misses, probe):
        return [
            sample(round=number, decode_tok_per_s=20.0),
            sample(round=number, kind="lfu-bundle", share=50.0, misses_per_token=misses),
            sample(
                round=number,
                kind="auto",
                share=50.0,
                decode_tok_per_s=auto,
                probe_mb_per_s=probe,
                hit_rate=0.9,
                stall_share=0.2,
            ),
        ]

    return taken


def test_bound_is_the_longer_of_computing_and_reading(round_of):
    [disk] = bounds(round_of(0, 4.0, misses=100.0, probe=500.0), SHAPE)
    assert (disk.compute_ms, disk.read_ms) == (50.0, pytest.approx(200.0))
    assert (disk.bound_tok_per_s, disk.reached) == (pytest.approx(5.0), pytest.approx(0.8))
    [processor] = bounds(round_of(0, 19.0, misses=10.0, probe=500.0), SHAPE)
    assert processor.bound_tok_per_s == 20.0


def test_bandwidth_needed():
    # 5 % of the misses may be late while that is less than 1 % of the accesses.
    assert needed_bandwidth(20, 200, 1e6, 0.05) == pytest.approx(19 * 1e6 / 0.05)
    assert needed_bandwidth(100, 200, 1e6, 0.05) == pytest.approx(98 * 1e6 / 0.05)
    assert needed_bandwidth(0, 200, 1e6, 0.05) == 0


def test_bound_without_its_parts_is_none(round_of):
    for missing in range(3):
        samples = round_of(0, 4.0, 100.0, 500.0)
        del samples[missing]
        assert not list(bounds(samples, SHAPE))
        assert not list(bound_tables(samples, SHAPE))


def test_tables_of_bounds(round_of):
    samples = [*round_of(0, 4.0, 100.0, 500.0), *round_of(1, 4.5, 100.0, 500.0)]
    page = "\n".join(bound_tables(samples, SHAPE))
    assert "| 50 % | 4.25 | 5 | 0.85 | 50 | 200 |" in page
    assert "| 50 % | 1.96 | 0.50 | no | 90.0% | 20.0% |" in page


def test_ablation_goes_one_step_at_a_time(facts):
    assert expand(["ablation", "auto", "stock-resident"]) == ("stock-resident", *ABLATION, "auto")
    rows = plan_rows(facts, expand(["ablation"]), [50.0])
    assert [row.kind for row in rows] == ["stock-resident", *ABLATION]
    steps = [ADVICE[kind] for kind in ABLATION]
    assert [(step.policy, step.look_ahead) for step in steps] == [
        ("lru", "off"),
        ("lfu", "off"),
        *[("lfu", "fate")] * 3,
        ("lfu", "auto"),
    ]
    assert [dict(step.rules) for step in steps] == [
        *[{"preempt": False, "reorder": False}] * 3,
        {"reorder": False},
        {},
        {},
    ]
    assert set(ABLATION) <= set(BUNDLED)


def test_every_kind_of_ours_has_its_advice():
    assert set(ADVICE) == {kind for kind in ALL_KINDS if not kind.startswith("stock")}


def test_ablation_table(sample):
    kinds = list(ABLATION)
    counts = {"hit_rate": 0.6, "misses_per_token": 80.0, "prefetch_hits_per_token": 20.0, "exact": "yes"}
    samples = [
        sample(round=n, kind=kind, share=50.0, decode_tok_per_s=float(2 + i), prefetches_late_per_token=10.0, **counts)
        for n in range(2)
        for i, kind in enumerate(kinds[:2])
    ]
    samples.append(sample(kind=kinds[5], share=50.0, status="unsupported", reason="no predictors"))
    page = "\n".join(ablation(summarise(samples), samples, SHAPE))
    assert "| ablation-lru 50% | 2 |  |  | 50.0% | 10.0% | 5.0% | 35.0% |" in page
    assert "| ablation-policy 50% | 3 | 1.50 (1.50 .. 1.50) | 1.50 (1.50 .. 1.50) | 50.0% |" in page
    assert "| ablation-learned 50% | **unsupported** |  |  |" in page
