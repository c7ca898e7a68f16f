"""The same through the command line: exit code 1 and one line on standard error, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import Write
from .gguf_bytes import UINT32, Gguf, scalar
from .victim import Outcome, in_process


def command_line(arguments: list[str]) -> None:
    from pyengine.__main__ import entry

    sys.argv = ["pyengine", *arguments]
    entry()


def run(*arguments: str) -> Outcome:
    """`pyengine run` with a prompt and these arguments, in a process of its own."""
    return in_process(command_line, ["run", "-p", "x", "-n", "2", "-t", "1", "-c", "64", *arguments])


def assert_refused(outcome: Outcome, part: str) -> None:
    assert outcome.exit_code == 1, outcome
    (line,) = outcome.output.splitlines()
    assert line.startswith("pyengine: error: "), outcome
    assert line.isprintable()
    assert part in line, outcome
    assert outcome.litter == ()


def test_a_sound_model_runs(sound_path: Path) -> None:
    outcome = run("-m", str(sound_path))
    assert outcome.exit_code == 0, outcome
    assert "2 layers x 4 of 4 experts" in outcome.output


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"no model\n" * 100, "is not a GGUF file"),
        (b"GGUF" + bytes(range(256)) * 50, "damaged or truncated"),
    ],
    ids=["missing", "empty", "text", "random"],
)
def test_files_that_are_no_models(write: Write, tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "broken.gguf" if content is None else write(content)
    assert_refused(run("-m", str(path)), part)


def test_a_folder(tmp_path: Path) -> None:
    assert_refused(run("-m", str(tmp_path)), "is not a regular file")


def test_a_truncated_model(write: Write, sound: Gguf) -> None:
    assert_refused(run("-m", str(write(sound.header() + sound.data[:-1]))), "truncated?")


def test_a_wrong_architecture(write: Write, sound: Gguf) -> None:
    unknown = sound.with_key("general.architecture", 8, b"\x05\0\0\0\0\0\0\0gpt-7")
    assert_refused(run("-m", str(write(unknown))), "unknown model architecture: 'gpt-7'")


@pytest.mark.parametrize("count", [0, 2**31, 2**32 - 1])
def test_an_absurd_count_of_experts(write: Write, sound: Gguf, count: int) -> None:
    absurd = sound.with_key("llama.expert_count", UINT32, scalar(UINT32, count))
    assert_refused(run("-m", str(write(absurd))), "expert_count")


@pytest.mark.parametrize("budget", ["", "abc", "-1", "0%", "0", "1KiB", "nan%", "True"])
def test_budgets_that_cannot_be(sound_path: Path, budget: str) -> None:
    assert_refused(run("-m", str(sound_path), f"--ram-budget={budget}"), "ram_budget")


def test_a_prompt_that_does_not_fit(sound_path: Path) -> None:
    outcome = run("-m", str(sound_path), "-p", "the rain " * 300)
    engaged, failure = outcome.output.splitlines()
    assert engaged.startswith("2 layers x 4 of 4 experts")
    assert failure.startswith("pyengine: error: the prompt has ")
    assert outcome.exit_code == 1


def test_a_prompt_file_that_is_missing_or_no_text(sound_path: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, part in ((tmp_path / "missing", "No such file"), (binary, "not valid UTF-8"), (tmp_path, "directory")):
        outcome = in_process(command_line, ["run", "-m", str(sound_path), "-f", str(path)])
        assert_refused(outcome, part)
