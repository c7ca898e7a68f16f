"""`pyengine bench --gpu`: rows on a GPU, which is a wrapped CPU device here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from models.fixtures import ModelFactory, generated_model

from pyengine.bench import run as bench_run
from pyengine.bench.gpu_placement import cpu_layers
from pyengine.bench.rows import GPU, GPU_AUTO, GPU_LRU, STOCK_GPU, STOCK_GPU_SPLIT, ModelFacts, plan_rows
from pyengine.bench.samples import decode_figures, read_samples
from pyengine.cli import main

__all__ = ["generated_model"]

TINY = ["--tokens", "3", "--prompts", "1", "--prompt-tokens", "16", "--rounds", "1", "--no-plots", "--force", "-t", "1"]


def test_rows_have_vram_shares_and_no_memory_limit(facts: ModelFacts) -> None:
    rows = plan_rows(facts, tuple(GPU), (25.0, 50.0))
    assert [row.name for row in rows] == [
        "stock-gpu",
        *("stock-gpu-split 25%", "stock-gpu-split 50%"),
        "gpu-on-demand",
        *("gpu-lru 25%", "gpu-lru 50%", "gpu-auto 25%", "gpu-auto 50%"),
    ]
    assert all(row.limit is None for row in rows)
    assert [row.stock for row in rows] == [row.kind in (STOCK_GPU, STOCK_GPU_SPLIT) for row in rows]


def test_the_split_rounds_in_favour_of_stock() -> None:
    assert [cpu_layers(24, share) for share in (None, 100, 75, 50, 12.5, 1)] == [0, 0, 6, 12, 21, 23]


def test_bytes_over_the_link_become_a_figure() -> None:
    counts = {"hits": 1, "misses": 3, "reads": 0, "bytes_read": 0, "stall_s": 0, "cpu_s": 1, "link_bytes": 8e6}
    decode = {"counts": counts, "tokens": 4, "seconds": 2.0, "step_seconds": [0.5] * 4}
    assert decode_figures(decode)["link_mb_per_token"] == 2
    assert "link_mb_per_token" not in decode_figures(decode | {"counts": counts | {"link_bytes": 0}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "gpu-lru"], "row 'gpu-lru' needs a GPU; name one with --gpu"),
        (["--gpu", "CUDA7"], "gpu 'CUDA7' is not known"),
        (["--gpu", "off"], "--gpu takes the name of a device"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments, *TINY, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_small_run_on_a_wrapped_device(
    generated_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run.quiet, "_DROP", tmp_path / "no such folder" / "drop_caches")  # spare the neighbours
    out, page = tmp_path / "out", tmp_path / "page.md"
    arguments = ["bench", "-m", str(generated_model("llama-q4_0").path), "--gpu", "CPU", "--budgets", "50", *TINY]
    done = CliRunner().invoke(main, [*arguments, "--out", str(out), "--report", str(page), "--json"])
    assert done.exit_code == 0, done.stderr
    rows = {row["kind"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == list(GPU)
    assert all(row["statuses"] == {"ok": 1} and row["exact"] == "yes" for row in rows.values())
    assert f"decode_tok_per_s / {STOCK_GPU}" in rows[GPU_AUTO]["ratios"]
    assert f"decode_tok_per_s / {STOCK_GPU_SPLIT}" in rows[GPU_LRU]["ratios"]
    samples = {sample.kind: sample for sample in read_samples(out / "bench.csv")}
    assert samples["gpu-on-demand"].hit_rate == 0 and (samples["gpu-on-demand"].link_mb_per_token or 0) > 0
    assert samples[STOCK_GPU].link_mb_per_token is None
    assert "| stock-gpu-split 50% |" in page.read_text()
