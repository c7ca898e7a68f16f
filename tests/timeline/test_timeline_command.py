"""`pyengine bench --timeline` on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
from chrome_format import check_format

from pyengine.cli import main


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyengine.cli.timeline._WARM_UP", 4)


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["bench", *arguments])


def test_both_files_are_written(tmp_path: Path) -> None:
    out = tmp_path / "one.two"
    result = run("--timeline", str(out), "--ram-budget", "40%", "--policy", "lru", "--tokens", "3", "-t", "2")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "one.two.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads((tmp_path / "one.two.json").read_text())
    check_format(trace)
    assert {p.name for p in tmp_path.iterdir()} == {"one.two.png", "one.two.json"}
    assert [e["name"] for e in trace["traceEvents"] if e.get("cat") == "token"] == ["token 0", "token 1", "token 2"]
    about = trace["otherData"]
    assert about["policy"] == "lru" and about["slots"] < about["experts"] and str(tmp_path) not in json.dumps(trace)
    assert "ms per token (median of 3)" in result.stdout and "one.two.png" in result.stderr


def test_as_json_and_with_another_picture(tmp_path: Path) -> None:
    result = run("--timeline", str(tmp_path / "a.svg"), "--tokens", "2", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["tokens"] == 2 and answer["tokens_per_s"] == pytest.approx(1e3 / answer["total"])
    assert {p.name for p in tmp_path.iterdir()} == {"a.svg", "a.json"}
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_what_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    result = run("--timeline", str(tmp_path / "absent" / "out"))
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"pyengine: error: {tmp_path / 'absent'}: there is no such folder\n"
    (tmp_path / "out.json").mkdir()
    result = run("--timeline", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr == f"pyengine: error: {tmp_path / 'out.json'}: Is a directory\n"
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--timeline", "x", "--rows", "lru"], "--rows does not go with --timeline"),
        (["--timeline", "x", "-m", "a", "-m", "b"], "takes one model"),
        (["--ram-budget", "50%"], "--ram-budget goes with --timeline"),
        (["--timeline", "x", "--ram-budget", "much"], "not understood"),
        (["--timeline", "x", "--policy", "fifo"], "no cache policy 'fifo'"),
        (["--timeline", "x", "-m", "absent.gguf"], "absent.gguf"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2) and words in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
