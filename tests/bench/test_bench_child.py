"""Real samples of the bundled model: stock never meets our library, and every row computes the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pyengine import bundled_model
from pyengine.bench.cgroups import Groups
from pyengine.bench.launch import launch
from pyengine.bench.model_facts import read_facts
from pyengine.bench.samples import figures
from pyengine.errors import ModelFileError


@pytest.fixture(scope="module")
def facts():
    return read_facts(bundled_model())


def take(kind, budget=0, **changes):
    known = {
        "model": str(bundled_model()),
        "kind": kind,
        "budget": budget,
        "bundle": "off",
        "n_tokens": 4,
        "n_prompts": 2,
        "prefill_tokens": 40,
        "limit_s": 60.0,
        "n_threads": 2,
    }
    return launch("pyengine.bench.child", known | changes, Groups(), 300)


@pytest.fixture(scope="module")
def stock():
    outcome = take("stock-resident")
    assert outcome.status == "ok", outcome
    return outcome.result


def test_facts_of_the_bundled_model(facts):
    assert (facts.n_layer, facts.n_expert, facts.n_expert_used, facts.n_experts, facts.n_matrix) == (30, 32, 8, 960, 3)
    assert facts.files == (bundled_model(),)
    assert facts.file_bytes == bundled_model().stat().st_size
    assert 0 < facts.largest_other < facts.other_bytes
    assert facts.least_budget * facts.n_experts == facts.slot_bytes  # one shape class


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelFileError, match=r"missing\.gguf"):
        read_facts(tmp_path / "missing.gguf")


def test_stock_never_meets_our_library(stock):
    assert stock["libraries"] == []
    assert "hits" not in stock["phases"]["decode"]["counts"]
    assert [len(answer) for answer in stock["tokens"]] == [4, 4]


def test_importing_the_child_loads_neither(tmp_path):
    script = (
        "import pyengine.bench.child, sys; print([n for n in ('llama_cpp', 'pyengine._native') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_ours_computes_stock_s_tokens_and_counts(stock, facts, share):
    outcome = take("lru", int(share * facts.slot_bytes))
    assert outcome.status == "ok", outcome
    assert outcome.result["tokens"] == stock["tokens"]
    assert outcome.result["libraries"] == ["libpyengine.so"]
    found = figures(outcome.result)
    counts = outcome.result["phases"]["decode"]["counts"]
    assert counts["hits"] + counts["misses"] == 3 * facts.n_layer * facts.n_expert_used
    if share < 0.25:  # less than a token uses
        assert found["hit_rate"] == 0
        assert found["reads_per_token"] == facts.n_layer * facts.n_expert_used * facts.n_matrix
        assert found["bandwidth_mb_per_s"] > 0


def test_memory_mapped_rows_load_without_repacking(stock):
    """Not repacked, the weights compute through other kernels, which need less anonymous memory: the peak shows it."""
    plain = take("stock-mmap-plain")
    assert plain.status == "ok", plain
    assert plain.result["libraries"] == []
    assert [len(answer) for answer in plain.result["tokens"]] == [4, 4]
    assert plain.result["peak_rss"] < stock["peak_rss"]


def test_a_bundle_that_does_not_exist_is_said(facts, tmp_path):
    outcome = take("lru-bundle", facts.slot_bytes, bundle=str(tmp_path / "missing.bundle"))
    assert outcome.status == "failed"
    assert "missing.bundle" in outcome.reason


def test_replayed_ids_take_the_place_of_the_router(facts, tmp_path):
    """Every token uses the same experts: after the first ones there is nothing left to miss."""
    ids = np.broadcast_to(np.arange(8, dtype=np.uint8), (64, facts.n_layer, 8))
    path = tmp_path / "same.npz"
    np.savez(path, ids=ids, starts=np.array([0]))
    outcome = take("lru", facts.slot_bytes, trace=str(path))
    assert outcome.status == "ok", outcome
    assert outcome.result["phases"]["prompt"]["counts"]["misses"] == facts.n_layer * 8
    for name in ("decode_cold", "prefill", "decode"):
        assert outcome.result["phases"][name]["counts"]["misses"] == 0, name


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    outcome = take("stock-resident", model=str(path))
    assert outcome.status == "failed"
    assert json.dumps(outcome.reason)
    assert "broken.gguf" in outcome.reason and "Traceback" not in outcome.reason
