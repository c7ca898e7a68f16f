"""Figures from what a child counted, and the CSV they go through."""

from __future__ import annotations

import io
from dataclasses import fields

import pytest
from toy_results import child_result

from pyengine.bench.samples import CsvWriter, Sample, figures, percentile, read_samples, same_tokens, text_hash
from pyengine.errors import UsageError


def test_figures_of_a_sample():
    found = figures(child_result([[1, 2], [3]]))
    expected = {
        "load_s": 1.5,
        "ttft_s": 2.0,
        "prompt_s": 0.5,
        "prefill_tok_per_s": 128.0,
        "decode_tok_per_s": 5.0,
        "decode_cold_tok_per_s": 5.0,
        "decode_tokens": 10,
        "tpot_p50_ms": 100.0,
        "tpot_p95_ms": 1100.0,
        "hit_rate": 0.7,
        "misses_per_token": 6.0,
        "reads_per_token": 18.0,
        "mb_per_token": 4.0,
        "disk_mb_per_token": 4.5,
        "stall_share": 0.25,
        "bandwidth_mb_per_s": 100.0,
        "cpu_s_per_token": 0.4,
        "io_cpu_ms_per_miss": 1.0,
        "peak_rss_bytes": 300,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(found) <= {field.name for field in fields(Sample)}


def test_stock_counts_no_experts():
    result = child_result([[1]])
    for phase in result["phases"].values():
        phase["counts"] = {"cpu_s": 1.0}
    found = figures(result)
    assert found["decode_tok_per_s"] == 5.0
    assert not {"hit_rate", "bandwidth_mb_per_s", "mb_per_token", "io_cpu_ms_per_miss"} & found.keys()


def test_a_phase_that_the_time_limit_emptied_has_no_speed():
    result = child_result([[1]])
    result["phases"]["decode"] |= {"tokens": 0, "step_seconds": []}
    found = figures(result)
    assert found["decode_tok_per_s"] is None
    assert "tpot_p50_ms" not in found


def test_hardly_any_load_has_no_bandwidth():
    result = child_result([[1]])
    result["phases"]["decode"]["counts"]["io_s"] = 0.019  # of 2 s
    assert "bandwidth_mb_per_s" not in figures(result)


def test_nothing_missed_means_no_bandwidth_rather_than_zero():
    result = child_result([[1]])
    result["phases"]["decode"]["counts"] |= {"misses": 0, "bytes_read": 0, "io_s": 0.0}
    found = figures(result)
    assert found["hit_rate"] == 1.0
    assert "bandwidth_mb_per_s" not in found
    assert "io_cpu_ms_per_miss" not in found


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3, 1, 2], 0.5, 2), ([1, 2, 3, 4], 0.5, 2), (range(1, 101), 0.95, 95), ([7], 0.1, 7)],
)
def test_percentile(values, share, expected):
    assert percentile(list(values), share) == expected


def test_percentile_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([[1, 2, 3], [4]], [[1, 2, 3], [4]], True),
        ([[1, 2, 3], [4]], [[1, 2], [4]], True),  # a time limit came first
        ([[1, 2, 3], [4]], [[1, 3], [4]], False),
        ([[1], [4, 5]], [[1], [4, 6]], False),
        ([[1], []], [[1], [4]], False),  # nothing is no agreement
    ],
)
def test_same_tokens_as_far_as_both_got(one, other, same):
    assert same_tokens(one, other) is same


def test_text_hash_tells_where_an_answer_ends():
    assert text_hash([[1, 2], [3]]) != text_hash([[1], [2, 3]])
    assert text_hash([[1, 2]]) == text_hash([(1, 2)])


def test_csv_gives_back_what_was_written(tmp_path, sample):
    path = tmp_path / "bench.csv"
    written = [
        sample(decode_tok_per_s=12.5, decode_tokens=48, text="abc", exact="yes"),
        sample(
            kind="lru", share=12.5, budget_bytes=10**10, limit_bytes=2**33, status="out of memory", reason="at 1, 2"
        ),
    ]
    with path.open("w", newline="") as file:
        table = CsvWriter(file)
        for one in written:
            table.add(one)
    assert read_samples(path) == written


def test_csv_is_written_line_by_line(sample):
    file = io.StringIO()
    table = CsvWriter(file)
    table.add(sample())
    assert len(file.getvalue().splitlines()) == 2


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", None])
def test_a_csv_of_others_is_refused_or_empty(tmp_path, sample, text):
    path = tmp_path / "bench.csv"
    if text is None:
        with path.open("w", newline="") as file:
            CsvWriter(file).add(sample())
        text = path.read_text().replace("stock-resident,,0,0,ok", "stock-resident,,zero,0,ok")
    path.write_text(text)
    if not text:
        assert read_samples(path) == []
    else:
        with pytest.raises(UsageError, match="is no benchmark result"):
            read_samples(path)
