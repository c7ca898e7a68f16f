"""Medians, ratios from pairs of the same round, noise and faults."""

from __future__ import annotations

import json

import pytest

from pyengine.bench.summary import faults, in_order, interval, noise, summarise


@pytest.fixture
def two_rows(sample):
    """Three rounds of stock-resident and lru 50 %. The second round was slow for both."""
    stock = [10.0, 4.0, 12.0]
    ours = [5.0, 2.4, 7.2]
    return [
        one
        for number in range(3)
        for one in (
            sample(round=number, decode_tok_per_s=stock[number], exact="yes"),
            sample(round=number, kind="lru", share=50.0, decode_tok_per_s=ours[number], hit_rate=0.5, exact="yes"),
        )
    ]


def test_medians_and_ratios(two_rows):
    stock, ours = summarise(two_rows)
    assert (stock.row, ours.row) == ("stock-resident", "lru 50%")
    assert stock.medians["decode_tok_per_s"] == 10.0
    assert "hit_rate" not in stock.medians
    found = ours.ratios["stock-resident", "decode_tok_per_s"]
    # Of the pairs 0.5, 0.6 and 0.6; the ratio of the medians would be 0.5.
    assert (found.median, found.low, found.high, found.pairs) == (0.6, 0.5, 0.6, 3)
    assert ("stock-resident", "decode_tok_per_s") not in stock.ratios
    assert stock.exact == ours.exact == "yes"


def test_a_round_without_its_partner_makes_no_pair(two_rows, sample):
    two_rows[0] = sample(round=0, status="out of memory", reason="killed")
    _, ours = summarise(two_rows)
    found = ours.ratios["stock-resident", "decode_tok_per_s"]
    assert (found.pairs, found.median) == (2, 0.6)


def test_a_killed_row_keeps_its_peak_but_no_speed(sample):
    [row] = summarise([sample(status="out of memory", reason="killed", peak_group_bytes=5)])
    assert row.statuses == {"out of memory": 1}
    assert row.medians["peak_group_bytes"] == 5
    assert "decode_tok_per_s" not in row.medians


def test_models_do_not_mix(sample):
    samples = [
        sample(decode_tok_per_s=10.0),
        sample(model="other.gguf", kind="lru", share=50.0, decode_tok_per_s=5.0),
    ]
    assert summarise(samples)[1].ratios == {}


def test_summary_is_json(two_rows):
    _, ours = summarise(two_rows)
    back = json.loads(json.dumps(ours.as_json()))
    assert back["ratios"]["decode_tok_per_s / stock-resident"]["median"] == 0.6
    assert back["label"] == ""


def test_replayed_rows_are_labelled(sample):
    [row] = summarise([sample(kind="lru", share=50.0, replay="trace.npz")])
    assert row.as_json()["label"] == "trace replay, text meaningless"


def test_interval_covers_the_median_and_narrows():
    few = interval([0.9, 1.0, 1.1, 1.0, 0.95])
    many = interval([0.9, 1.0, 1.1, 1.0, 0.95] * 20)
    assert few[0] <= 1.0 <= few[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_noise(sample):
    samples = [
        sample(round=n, decode_tok_per_s=speed, fixed_work_s=work, other_cpu=other, stolen_cpu=0.0)
        for n, (speed, work, other) in enumerate([(10.0, 0.2, 0.0), (9.0, 0.2, 0.3), (10.0, 0.3, 0.1)])
    ]
    found = noise(samples)
    assert found.fixed_work == pytest.approx(0.5)
    assert found.resident == {"toy.gguf": pytest.approx(0.1)}
    assert found.other_cpu == 0.3
    assert "50.0%" in found.sentence() and "toy.gguf by 10.0%" in found.sentence() and "0.30" in found.sentence()


def test_noise_of_nothing_is_unknown():
    assert noise([]).sentence() == "unknown"


def test_faults(sample):
    samples = [
        sample(kind="stock-mmap-plain", exact="no"),  # other kernels
        sample(kind="stock-mmap", status="out of memory", reason="killed"),  # a result, no fault
        sample(kind="lru", share=50.0, exact="yes"),
        sample(kind="lru", share=50.0, round=1, exact="no"),
        sample(kind="on-demand", status="failed", reason="exit code 1: gone"),
    ]
    assert faults(summarise(samples)) == [
        "toy.gguf, lru 50%: other tokens than the reference's",
        "toy.gguf, on-demand: 1 x failed (exit code 1: gone)",
    ]


def test_rows_in_order(sample):
    samples = [
        sample(kind="lru", share=50.0),
        sample(kind="lru", share=12.5),
        sample(model="b.gguf"),
        sample(kind="stock-resident"),
    ]
    names = [(row.model, row.row) for row in in_order(summarise(samples))]
    assert names == [
        ("toy.gguf", "stock-resident"),
        ("toy.gguf", "lru 12.5%"),
        ("toy.gguf", "lru 50%"),
        ("b.gguf", "stock-resident"),
    ]
