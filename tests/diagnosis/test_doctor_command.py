"""`pyengine doctor`: one line per check, its exit code, and that a broken installation does not stop it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pyengine import startup
from pyengine.cli import main
from pyengine.diagnosis import checks, storage
from pyengine.diagnosis.checks import CHECKS
from pyengine.diagnosis.finding import fail, note, slow
from pyengine.errors import StartupError
from pyengine.planning.disk import DiskSpeed


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "measure_disk", lambda *_: DiskSpeed(1e9, 1e-4, 65536, True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_every_check_is_shown_within_80_columns() -> None:
    done = doctor()
    assert done.exit_code == 0, done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in CHECKS:
        assert f" {name} " in text


def test_a_failure_is_exit_code_1_and_slowness_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {"one": lambda _: note("a note"), "two": lambda _: slow("it is slow", "hurry")}
    monkeypatch.setattr(checks, "CHECKS", made_up)
    done = doctor()
    assert done.exit_code == 0
    assert [line.split() for line in done.stdout.splitlines() if line] == [
        ["note", "one", "a", "note"],
        ["slow", "two", "it", "is", "slow"],
        ["->", "hurry"],
        ["1", "would", "be", "slow"],
    ]
    monkeypatch.setattr(checks, "CHECKS", made_up | {"three": lambda _: fail("it fails", "mend it")})
    done = doctor()
    assert done.exit_code == 1 and "1 would fail, 1 would be slow" in done.stdout
    done = doctor("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["three"] == {"level": "fail", "found": "it fails", "remedy": "mend it"}


def test_a_bad_model_is_a_finding(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_text("nothing")
    for model in (bad, tmp_path / "none.gguf"):
        done = doctor("-m", str(model), "--json")
        assert done.exit_code == 1
        found = json.loads(done.stdout)
        assert list(found) == list(CHECKS)
        assert found["model"]["level"] == "fail" and model.name in found["model"]["found"]


def test_a_broken_installation_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise StartupError("llama-cpp-python is missing.\ninstall it")

    monkeypatch.setattr(startup, "check", refuse)
    done = doctor("--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["llama.cpp"]["level"] == "fail"
    assert [name for name in found if found[name]["level"] == "fail"] == ["llama.cpp"]
