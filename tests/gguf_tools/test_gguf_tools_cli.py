"""The group of commands: help, errors in one line, and that it starts without the heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gguf_tools.cli import COMMANDS, failure_message
from gguf_tools.errors import ModelFileError, RequestError

HEAVY = ("gguf", "numpy", "rich", "llama_cpp", "pyengine")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["synthesize"], ["widen"]])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys; from gguf_tools.cli import main; main([*sys.argv[1:], '--help'], standalone_mode=False); "
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("LOADED []\n")


def test_help_lists_every_command(invoke):
    shown = invoke("--help")
    assert shown.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in shown.stdout


def test_inspecting_widening_and_synthesizing_need_no_pyengine():
    modules = "inspect_model", "widen", "synthesize", "cli.inspect", "cli.widen", "cli.synthesize"
    script = (
        "import sys; import " + ", ".join(f"gguf_tools.{m}" for m in modules) + "; print('pyengine' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["wieden"],
        ["inspect"],
        ["widen", "a.gguf", "b.gguf"],
        ["widen", "a.gguf", "b.gguf", "--ff", "0"],
        ["synthesize", "gpt-5", "b.gguf"],
        ["synthesize", "mixtral-8x7b", "b.gguf", "--layers", "0"],
    ],
)
def test_usage_errors_exit_2(invoke, arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Error: " in done.stderr


@pytest.mark.parametrize("arguments", [["inspect", "no.gguf"], ["widen", "no.gguf", "out.gguf", "--ff", "64"]])
def test_expected_failures_are_one_line_and_exit_1(invoke, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "gguf_tools: error: no.gguf: no such file\n"


def test_debug_shows_the_traceback(invoke):
    done = invoke("--debug", "inspect", "no.gguf")
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_failure_messages():
    assert failure_message(RequestError("two\n  lines \x1b[2J")) == "two lines \ufffd[2J"
    assert failure_message(ModelFileError("bad")) == "bad"
    assert failure_message(FileNotFoundError(2, "No such file or directory", "a b")) == "a b: No such file or directory"
    assert failure_message(OSError(28, "No space left on device")) == "No space left on device"
    assert failure_message(MemoryError()) == "out of memory"
    assert failure_message(BrokenPipeError(32, "Broken pipe")) is None
    assert failure_message(ValueError("a bug")) is None
