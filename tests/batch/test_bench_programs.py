"""What the benchmark programs of batches and prompts take for granted. Nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def test_passages_are_as_long_as_wanted_and_differ(programs):
    from passages import passages

    def words(text):
        return [len(word) for word in text.split()]

    found = passages(words, 40, 30, seed=1)
    assert {len(one) for one in found} == {30}
    assert len({tuple(one) for one in found}) == 40
    assert found == passages(words, 40, 30, seed=1) != passages(words, 40, 30, seed=2)
    (long,) = passages(words, 1, 100_000, seed=3)  # more than there is: from the beginning again
    assert len(long) == 100_000


def test_pieces_of_a_prompt_end_at_every_length(programs):
    from prompt_worker import ends_of

    assert ends_of([8192]) == list(range(512, 8193, 512))
    assert ends_of([100, 700, 1024]) == [100, 512, 700, 1024]
    assert ends_of([64]) == [64]


def test_rows_that_were_cut_are_compared_where_both_have_been(programs):
    from prompt_lengths import Curve, compared

    ours = Curve("auto", 25.0, {0: {512: 2.0, 1024: 4.0, 2048: 8.0}, 1: {512: 2.0, 1024: 4.0, 2048: 8.0}})
    slow = Curve("on-demand", None, {0: {512: 8.0, 1024: 16.0}, 1: {512: 8.0}})
    assert compared(ours, slow, 512) == "auto 25% / on-demand: 4.00 (95 %: 4.00 .. 4.00, rounds: 2)"
    assert compared(ours, slow, 2048).startswith("auto 25% / on-demand (of the first 512, cut): 4.00")
    assert compared(ours, Curve("stock-mmap", 25.0, {}), 512).endswith(": -")


def test_columns_differ_by_one_thing_and_stock_has_the_planners_batch(programs):
    from batch_ablation import COLUMNS, MULTI, ONE, PLANNED, PREFETCH, REORDER, SHOWN, STOCK, task_of
    from batch_worker import Task

    base = Task("m", False, 8, None, 32, 1, "off", "", "", {}, 4, 5, 6, 0, 1.0, 1, None)
    tasks = {name: task_of(base, COLUMNS[name], 8, {"n": 20, "prompt_chunk": 64}, 7) for name in SHOWN}
    assert [tasks[name].n for name in SHOWN] == [1, 8, 8, 8, None, 20]
    assert (tasks[STOCK].stock, tasks[STOCK].prompt_chunk) == (True, 64)
    differences = []
    for before, after in ((ONE, MULTI), (MULTI, PREFETCH), (PREFETCH, REORDER), (REORDER, PLANNED)):
        a, b = vars(tasks[before]), vars(tasks[after])
        differences.append({name for name in a if a[name] != b[name]})
    assert differences == [{"n"}, {"policy", "look_ahead", "rules"}, {"rules"}, {"n"}]
    assert task_of(base, COLUMNS[STOCK], 8, None, 7).n == 8


def test_stock_answers_the_same_lines_without_pyengine(tmp_path):
    """The same Scheduler steps a llama_cpp.Llama and gives what pyengine gives; its native part is not loaded."""
    from pyengine import bundled_model

    task = {
        "model": str(bundled_model()), "n": 2, "prompt_chunk": None, "most": 2, "bundle": "off", "policy": "lru",
        "look_ahead": "off", "rules": {}, "n_lines": 3, "prompt_tokens": 5, "answer_tokens": 6, "seed": 1,
        "seconds": 600.0, "n_threads": 1, "bytes_per_s": None,
    }  # fmt: skip
    found = []
    for stock in (True, False):
        done = subprocess.run(
            [sys.executable, "-m", "batch_worker"],
            input=json.dumps(task | {"stock": stock, "budget": 10**9}),
            env=os.environ | {"PYTHONPATH": str(BENCH), "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [one["status"] for one in found] == ["ok", "ok"], found
    stock, ours = found
    assert stock["libraries"] == [] and ours["libraries"]
    assert stock["finished"] == 3 and not stock["cut"]
    assert stock["tokens"] == ours["tokens"] and {len(tokens) for tokens in stock["tokens"]} == {6}
    assert stock["steps"] == ours["steps"]
