"""`pyengine replay`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from brute_force import random_steps

from pyengine import bundled_model
from pyengine.cli import main
from pyengine.errors import UsageError
from pyengine.policies import POLICIES
from pyengine.replay.layout import own_slots
from pyengine.replay.locality import locality, random_srp, srp
from pyengine.replay.plot import draw
from pyengine.replay.run import BOUNDS, Result, make_predictor
from pyengine.replay.sizes import layout_of_budget, read_fitting_shape
from pyengine.traces import Trace, TracedModel, save_trace

SLICE = str(Path(__file__).with_name("gpt_oss_slice.npz"))
TIMES = ["--bandwidth", "1000", "--compute", "100", "--expert-bytes", "3000000"]


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["replay", *arguments])


def answer(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A trace with prompts and token ids."""
    steps = random_steps(1, n_token=30)
    path = tmp_path / "small.trace"
    model = TracedModel("small.gguf", "test", 3, 8, 3)
    save_trace(path, Trace(model, steps.ids, np.array([0, 10]), tokens=np.arange(30, dtype=np.int32) % 7))
    return str(path)


def test_every_policy_by_default(small: str) -> None:
    found = answer(small)
    assert [r["policy"] for r in found["results"]] == [*POLICIES, *BOUNDS]
    by_name = {r["policy"]: r for r in found["results"]}
    for r in found["results"]:
        assert r["predictor"] == "none" and r["slots"] == 12 and r["shared"] and r["slots_per_layer"] == 4
        assert 0 <= r["hit_rate"] <= by_name["belady"]["hit_rate"] < 1
        assert r["missing_per_token"] == pytest.approx((1 - r["hit_rate"]) * 9)
        assert np.mean(r["hit_rate_by_layer"]) == pytest.approx(r["hit_rate"])
    assert by_name["lru"]["gap_closed"] == 0 and by_name["belady"]["gap_closed"] == 1
    assert found["tokens"] == 30 and found["model"]["name"] == "small.gguf" and found["timing"] is None
    assert found["locality"]["verdict"] and len(found["locality"]["sch"]) == 4


def test_slots_of_each_layer_and_only_the_last_tokens(small: str) -> None:
    found = answer(small, "--slots", "3", "--slots", "5", "--policy", "lfu", "--policy", "belady", "--tokens", "20")
    assert found["tokens"] == 20
    assert [(r["policy"], r["slots"], r["shared"]) for r in found["results"]] == [
        ("lfu", 9, False),
        ("belady", 9, False),
        ("lfu", 15, False),
        ("belady", 15, False),
    ]
    assert [r["gap_closed"] for r in found["results"]] == [None] * 4, "without LRU there is no gap"


def test_predictors_in_time(small: str) -> None:
    names = ["none", "repeat", "popularity", "correlation", "tokens", "simulated:0.8"]
    found = answer(small, "--policy", "lru", *TIMES, *[a for n in names for a in ("--predictor", n)], "--more", "1")
    assert [r["predictor"] for r in found["results"]] == names
    for r in found["results"]:
        assert r["resident"] + r["in_time"] + r["late"] + r["miss"] == pytest.approx(1)
        assert r["hit_rate"] == pytest.approx(r["resident"] + r["in_time"])
        assert 0 < r["tokens_per_s"] <= 10.001 and 0 <= r["stall_share"] < 1
        assert r["ratio"] == pytest.approx(3e6 / 1e9 / (0.1 / 3))
    plain, *predicted = found["results"]
    assert plain["recall"] is None and plain["bound_tokens_per_s"] >= plain["tokens_per_s"]
    for r in predicted:
        assert 0 < r["recall_at_k"] <= r["recall"] <= 1
        assert r["good_pred"] == pytest.approx(r["accuracy"] * r["fetch_rate"])
        assert r["good_pred_direct"] <= r["recall"]
    assert set(found["predictors"]) == set(names[1:])
    assert [j["distance"] for j in found["predictors"]["correlation"]] == [1, 2, 3]
    judged = found["predictors"]["tokens"][0]
    assert judged["recall_at_k"] <= judged["recall_at_k_more"] and len(judged["recall_at_k_by_layer"]) == 3


def test_scores_from_a_file(small: str, tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((40, 3, 8)).astype(np.float16)
    np.save(tmp_path / "scores.npy", scores)
    name = f"scores:{tmp_path / 'scores.npy'}"
    (result,) = answer(small, "--policy", "lfu", *TIMES, "--predictor", name)["results"]
    assert 0.2 < result["recall"] < 0.6, "three of eight at random"
    np.save(tmp_path / "scores.npy", scores[:, :2])
    assert "shape" in run(small, *TIMES, "--predictor", name).output
    np.save(tmp_path / "scores.npy", scores[:9])
    assert "no scores for 30 tokens" in run(small, *TIMES, "--predictor", name).output
    (tmp_path / "scores.npy").write_bytes(b"nonsense")
    assert "no array of scores" in run(small, *TIMES, "--predictor", name).output


def test_the_tables_fit_a_terminal(small: str) -> None:
    for arguments in ([], [*TIMES, "--predictor", "none", "--predictor", "simulated:0.85"]):
        result = click.testing.CliRunner(env={"COLUMNS": "80"}).invoke(main, ["replay", small, *arguments])
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert all(len(line) <= 80 for line in lines if not line.lstrip().startswith("simulated"))
        assert "…" not in result.stdout
        for name in (*POLICIES, *BOUNDS, "SRP(16)"):
            assert name in result.stdout
        assert ("simulated:0.85" in result.stdout) == bool(arguments)


def test_a_picture(small: str, tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    found = answer(small, "--policy", "lru", "--policy", "belady", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    slots = sorted({r["slots"] for r in found["results"]})
    assert slots == [3, 6, 9, 12, 15, 18, 21], "many sizes"
    rates = [r["hit_rate"] for r in found["results"] if r["policy"] == "belady"]
    assert rates == sorted(rates)
    result = run(small, "--policy", "lru", "--plot", str(tmp_path / "plot.xyz"))
    assert result.exit_code == 1 and "plot.xyz" in result.output


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    from pyengine.replay.bounds import belady

    steps = random_steps(2)
    results = [
        Result("belady", "none", layout, belady(steps, layout)) for layout in (own_slots(3, 8, 3, n) for n in (3, 5))
    ]
    for name in ("a.png", "b.png"):
        draw(results, "title", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_sizes_from_a_model(tmp_path: Path) -> None:
    traced = TracedModel("any.gguf", "llama", 30, 32, 8)
    shape = read_fitting_shape(bundled_model(), traced)
    layout = layout_of_budget("50%", traced, shape)
    assert layout.groups == (tuple(range(30)),) and abs(layout.total - 480) <= 1
    in_bytes = layout_of_budget(str(shape.info.slot_bytes // 2), traced, shape)
    assert in_bytes == layout
    foreign = TracedModel("", "", 30, 31, 8)  # the highest id was never seen
    assert read_fitting_shape(bundled_model(), foreign).info.n_expert == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "fifo"], "no cache policy 'fifo'"),
        (["--predictor", "magic"], "no predictor 'magic'"),
        (["--predictor", "simulated:2"], "from 0 to 1"),
        (["--predictor", "repeat"], "prefetching needs times"),
        (["--predictor", "tokens", *TIMES], "no token ids"),
        (["--bandwidth", "3"], "also say --compute and --expert-bytes"),
        (["--budget", "2GiB"], "needs the model"),
        (["--budget", "many"], "not understood"),
        (["--budget", "50%", "--slots", "3"], "contradict"),
        (["-m", str(bundled_model())], "the trace has 24 layers"),
        (["-m", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_what_is_refused_in_a_sentence(arguments: list[str], words: str) -> None:
    result = run(SLICE, *arguments)
    assert result.exit_code in (1, 2) and words in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    for name, words in (("text", "not a usable routing trace"), ("absent", "No such file")):
        result = run(str(tmp_path / name))
        assert result.exit_code == 1 and words in result.output
    empty = tmp_path / "empty.trace"
    save_trace(empty, Trace(TracedModel("", "", 2, 4, 1), np.zeros((0, 2, 1), np.uint16)))
    assert "no decoded tokens" in run(str(empty)).output


def test_a_trace_shorter_than_a_segment_has_no_verdict() -> None:
    found = locality(random_steps(0, n_token=5))
    assert found.as_json()["srp"] is None
    assert "too short" in found.verdict


def test_srp_by_hand() -> None:
    steady = np.tile(np.array([[[1, 5]]], np.uint16), (32, 1, 1))
    assert srp(steady, 8, 16).tolist() == [1]
    # Half of the tokens use 0 and 1, half 2 and 3: all four, precision 1/2, recall 1.
    halves = np.tile(np.array([[[0, 1]], [[2, 3]]], np.uint16), (16, 1, 1))
    assert srp(halves, 8, 16).tolist() == pytest.approx([2 / 3])
    assert 0.3 < random_srp(32, 4) < 0.34
    assert random_srp(4, 4) == 1


def test_an_unknown_predictor() -> None:
    with pytest.raises(UsageError, match="there are none, repeat"):
        make_predictor("magic", random_steps(0), 1)
