"""`pyengine learn-policy` from end to end, on short traces of routing that goes in a circle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from pyengine import bundled_model
from pyengine.cli import learn_policy, main
from pyengine.policies import learned, learning, policy_file
from pyengine.replay.layout import Layout
from pyengine.traces import Trace, TracedModel, save_trace

N_TOKEN = 3000


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        main, [*map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1", "PYENGINE_MODEL": ""}
    )


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def circle(n_token: int, n_layer: int, n_expert: int, n_used: int) -> npt.NDArray[np.uint8]:
    """Tokens whose experts follow a circle that begins anew at random: frequencies say nothing, the last token all."""
    random = np.random.default_rng(1)
    n, phase = n_expert // n_used, 0
    ids = np.zeros((n_token, n_layer, n_used), np.uint8)
    for token in range(n_token):
        phase = int(random.integers(n)) if random.random() < 0.05 else (phase + 1) % n
        ids[token] = phase * n_used + np.arange(n_used)
    return ids


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers and few steps: enough for a circle."""
    for name, value in {"_UNITS": 16, "_WIDTH": 24}.items():
        monkeypatch.setattr(learned, name, value)
    for name, steps in {"_STEPS": 300, "_PASSES": (3, 6), "FEWEST": 640}.items():
        monkeypatch.setattr(learning, name, steps)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyengine"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A trace of another origin, which names no model."""
    path = tmp_path / "foreign.npz"
    np.savez(path, ids=circle(N_TOKEN, 2, 12, 2), starts=np.arange(0, N_TOKEN, 70))
    return path


def test_what_is_learned_is_kept_and_replayed(foreign: Path, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "learned.npz"
    found = answer("learn-policy", foreign, "-o", file, "--slots", 6)
    assert found["kept"] == str(file) and file.exists() and not cache.exists()
    assert found["tokens"] == {"learned_from": 2730, "held_out": 270} and found["by_sequence"]
    rates = {r["policy"]: r["hit_rate"] for r in found["results"]}
    assert list(rates) == ["lru", "lfu", "learned", "belady"]
    assert rates["lfu"] + 0.1 < rates["learned"] <= rates["belady"]
    again = answer("replay", foreign, "--policy", f"learned:{file}", "--slots", 6, "--tokens", 270)
    assert [r["hit_rate"] for r in again["results"]] == [rates["learned"]]
    shown = run("replay", foreign, "--policy", f"learned:{file}", "--policy", "lru", "--tokens", 270)
    assert shown.exit_code == 0 and "learned:learned.npz" in shown.stdout


def test_the_models_own_file_and_the_table(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many layers take long to learn: what is kept here knows nothing."""

    def learn(_: object, layout: Layout, __: object) -> Any:
        policy = learned.LearnedPolicy(layout.cache_shape)
        policy.take(learned.blank(960))
        return policy.save()

    monkeypatch.setattr(learn_policy, "_learn", learn)
    monkeypatch.setattr(learn_policy, "_where_not_better", lambda results: [])
    trace = tmp_path / "trace.npz"
    ids = circle(2000, 30, 32, 8).astype(np.uint16)
    save_trace(trace, Trace(TracedModel("any", "llama", 30, 32, 8), ids, np.arange(0, 2000, 90)))
    result = run("learn-policy", trace, "--slots", 16)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for word in ("1800 to learn from, 200 held out", "lru", "lfu", "learned", "belady"):
        assert word in result.stdout
    file = policy_file(Path(bundled_model()))
    assert list((cache / "policies").iterdir()) == [file]
    assert str(file) in result.stderr.replace("\n", "")
    found = answer("replay", trace, "--policy", "learned", "-m", bundled_model(), "--slots", 16, "--tokens", 200)
    assert found["results"][0]["policy"] == f"learned:{file}"


def test_what_does_not_beat_lfu_is_not_kept(tmp_path: Path) -> None:
    """Routing by chance: there is nothing to learn. What was kept before stays."""
    trace, file = tmp_path / "trace.npz", tmp_path / "learned.npz"
    ids = np.random.default_rng(3).random((900, 2, 12)).argsort(axis=2)[:, :, :2].astype(np.uint8)
    np.savez(trace, ids=ids, starts=np.array([0]))
    file.write_bytes(b"kept before")
    result = run("learn-policy", trace, "-o", file)
    assert result.exit_code == 0, result.output
    assert "nothing is kept" in result.stderr
    assert file.read_bytes() == b"kept before"
    assert answer("learn-policy", trace, "-o", file)["kept"] is None


def test_too_short_a_trace_is_one_line(tmp_path: Path, cache: Path) -> None:
    trace = tmp_path / "trace.npz"
    np.savez(trace, ids=circle(700, 2, 12, 2), starts=np.array([0]))
    result = run("learn-policy", trace, "-o", tmp_path / "learned.npz")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and not result.stdout
    assert "has 700 decoded tokens; 711 is the least" in result.stderr
    assert list(tmp_path.iterdir()) == [trace]


@pytest.mark.parametrize("moment", ["fit", "save_policy"])
def test_an_interrupt_leaves_nothing(foreign: Path, cache: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if moment == "fit":
        monkeypatch.setattr(learning, "_gradients", interrupted)
    else:
        monkeypatch.setattr(np, "savez", interrupted)
    file = foreign.with_name("learned.npz")
    result = run("learn-policy", foreign, "-o", file, "--slots", 6)
    assert result.exit_code == 130
    assert list(foreign.parent.iterdir()) == [foreign] and not cache.exists()


def test_what_cannot_be_used_is_one_line(foreign: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    for arguments, words in (
        (["learn-policy", tmp_path / "text", "-o", tmp_path / "o"], "not a usable routing trace"),
        (["learn-policy", tmp_path / "absent", "-o", tmp_path / "o"], "absent: No such file"),
        (["learn-policy", foreign], "the trace has 2 layers"),
        (["replay", foreign, "--policy", f"learned:{tmp_path / 'text'}"], "no usable cache policy"),
        (["replay", foreign, "--policy", f"learned:{tmp_path / 'absent'}"], "absent: No such file"),
        (["replay", foreign, "--policy", "learned"], "learn-policy"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and words in result.stderr, result.output
    assert not (tmp_path / "o").exists() and not cache.exists()
