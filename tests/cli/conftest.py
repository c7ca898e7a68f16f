"""The command line over FakeLlama: in this process through click's runner, and in a terminal of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_engine import END, FakeLlama
from pseudo_terminal import FAKE_MAIN, Terminal

import pyengine
from pyengine.cli import completion, main

Invoke = Callable[..., Result]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    """A fresh subclass of FakeLlama in the place of pyengine.Llama; script it through its attributes."""

    class Scripted(FakeLlama):
        pass

    monkeypatch.setitem(vars(pyengine), "Llama", Scripted)  # setattr would first import the real one
    monkeypatch.setattr(completion, "end_of_generation", lambda _: lambda token: token == END)
    return Scripted


@pytest.fixture
def invoke(fake: type[FakeLlama], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command line with empty standard input, unless given another."""
    for name in os.environ:
        if name.startswith("PYENGINE_"):
            monkeypatch.delenv(name)

    def run(*arguments: str, stdin: str | bytes = "", env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=stdin, env=env, prog_name="pyengine")

    return run


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a child process: a fresh state directory, a plain terminal, this Python path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYENGINE_", "NO_COLOR"))}
    return kept | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm",
        "PYTHONIOENCODING": "utf-8",
    }


@pytest.fixture
def terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts the command line over FakeLlama in a terminal and ends it with the test."""
    started: list[Terminal] = []

    def start(*arguments: str, env: dict[str, str] | None = None, **script: Any) -> Terminal:
        variables = environment | (env or {}) | {"FAKE_LLAMA": json.dumps(script)}
        started.append(Terminal([sys.executable, str(FAKE_MAIN), *arguments], variables, str(tmp_path)))
        return started[-1]

    yield start
    for terminal in started:
        terminal.kill()
