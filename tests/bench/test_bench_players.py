"""Real players, and what the command says to options that contradict each other."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from pyengine import bundled_model
from pyengine.bench.cgroups import CgroupError, DiskLimit, Groups
from pyengine.bench.child import Task, without_profiles
from pyengine.bench.players import GoneError, Player
from pyengine.cache import cache_dir
from pyengine.cli import main


def task_of(kind, **changes):
    known = {"budget": 40_000_000, "bundle": "off", "n_tokens": 100, "n_prompts": 2, "prefill_tokens": 1, "limit_s": 60}
    return Task(**{"model": str(bundled_model()), "kind": kind, "n_threads": 1, **known, **changes})


@pytest.fixture
def player():
    alive = []

    def start(*arguments):
        alive.append(Player(*arguments))
        return alive[-1]

    yield start
    for one in alive:
        one.end()


def test_players_take_turns_and_compute_the_same_tokens(player):
    both = [player(task_of(kind), Groups(), 300) for kind in ("stock-resident", "activation-path")]
    for steps in (3, 2):
        phases = [one.turn(steps, 300, 300) for one in both]
        assert [phase["tokens"] for phase in phases] == [steps, steps]
    assert both[0].transcript == both[1].transcript
    assert [len(tokens) for tokens in both[0].transcript.values()] == [5]
    assert "hits" in phases[1]["counts"] and "hits" not in phases[0]["counts"]
    with pytest.raises(GoneError) as late:
        both[0].turn(50, 300, 0.0)
    assert late.value.status == "timed out"
    both[0].end()


def test_a_player_that_cannot_load_says_why(player):
    with pytest.raises(GoneError, match="No such file") as gone:
        player(task_of("lru-bundle", model="missing.gguf"), Groups(), 300)
    assert gone.value.status == "failed"


def test_samples_know_no_profile_and_leave_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("profiles", "predictors"):
        (tmp_path / "pyengine" / name).mkdir(parents=True)
        (tmp_path / "pyengine" / name / "kept.npz").write_text(name)
    with without_profiles():
        assert (cache_dir() / "predictors" / "kept.npz").read_text() == "predictors"
        (cache_dir() / "profiles").mkdir()
        (cache_dir() / "profiles" / "new.npz").write_text("of a sample")
    assert cache_dir() == tmp_path / "pyengine"
    assert [path.name for path in (cache_dir() / "profiles").iterdir()] == ["kept.npz"]


def test_groups_without_a_disk_limit_take_none_later():
    with pytest.raises(CgroupError, match="made without a limit"):
        Groups().limit_disk(DiskLimit("8:0", 10**6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--never-slower", "--papers"], "are two experiments"),
        (["--minutes", "3"], "--minutes goes with --never-slower or --papers"),
        (["--papers", "--disks", "none"], "--disks goes with --never-slower, --ratios with --papers"),
        (["--never-slower", "--rows", "lru"], "--rows does not go with"),
        (["--papers", "--ratios", "1,x"], "is not a list of numbers"),
        (["--papers", "--ratios", "0"], "is not a list of numbers"),
    ],
)
def test_options_that_contradict_each_other(arguments, message):
    done = CliRunner().invoke(main, ["bench", *arguments], prog_name="pyengine")
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_disk_that_is_not_understood(tmp_path):
    arguments = ["bench", "--never-slower", "--disks", "none,fast", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments, prog_name="pyengine")
    assert (done.exit_code, "'fast' is not understood" in done.stderr) == (1, True)
