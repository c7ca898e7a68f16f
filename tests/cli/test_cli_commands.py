"""The group: help, version, errors, and that it starts without the heavy imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyengine.cli import COMMANDS, failure_message
from pyengine.errors import PyengineError

HEAVY = ("llama_cpp", "numpy", "rich", "prompt_toolkit", "pyengine.llama")


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments, environment):
    script = (
        "import sys; from pyengine.cli import main; main(sys.argv[1:], standalone_mode=False); "
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("LOADED []\n")


def test_help_lists_every_command(invoke):
    done = invoke("--help")
    assert done.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("command", ["chat", "run"])
def test_help_shows_llama_cpp_defaults_and_environment(invoke, command):
    shown = " ".join(invoke(command, "--help").stdout.split())
    for option, default in [("--temp T", "0.8"), ("--top-k N", "40"), ("--top-p P", "0.95"), ("--min-p P", "0.05")]:
        after = shown.split(option, 1)[1]
        assert after.split("[default: ", 1)[1].startswith(f"{default}]"), option
    assert "PYENGINE_RAM_BUDGET" in shown


def test_version(invoke):
    done = invoke("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("pyengine ")
    assert "llama-cpp-python 0.3.36" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["rnu"],
        ["chat", "--no-such-option"],
        ["run"],
        ["run", "-p", "a", "-f", "b"],
        ["run", "-p", "a", "-n", "-2"],
        ["chat", "-p", "a", "-n", "0"],
        ["chat", "-p", "a", "--temp", "-0.1"],
        ["chat", "-p", "a", "--top-p", "1.5"],
        ["chat", "-p", "a", "-s", "4294967295"],
    ],
)
def test_usage_errors_exit_2_and_load_nothing(invoke, fake, arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert done.stdout == ""
    assert fake.made == []


@pytest.mark.parametrize("command", ["chat", "run"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "missing.gguf"], "missing.gguf: no such file"),
        (["--ram-budget", "5"], "ram_budget 5 is below the least budget of 497664 bytes"),
        (["--ram-budget", "lots"], "ram_budget 'lots' is below the least budget of 497664 bytes"),
    ],
)
def test_expected_failures_are_one_line_and_exit_1(invoke, command, arguments, message):
    done = invoke(command, "-p", "hello", *arguments)
    assert done.exit_code == 1
    assert done.stderr == f"pyengine: error: {message}\n"
    assert done.stdout == ""


def test_debug_shows_the_traceback(invoke):
    done = invoke("--debug", "run", "-p", "hello", "-m", "missing.gguf")
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("pyengine: error: missing.gguf: no such file\n")


def test_bugs_are_not_dressed_up_as_failures(invoke, fake, monkeypatch):
    def broken(self):
        raise TypeError("a bug")

    monkeypatch.setattr(fake, "expert_stats", broken)
    assert isinstance(invoke("run", "-p", "hello", "--json").exception, TypeError)


def test_failure_messages():
    assert failure_message(PyengineError("two\n  lines")) == "two lines"
    assert failure_message(FileNotFoundError(2, "No such file or directory", "a b")) == "a b: No such file or directory"
    assert failure_message(MemoryError()) == "out of memory"
    assert failure_message(RuntimeError()) == "RuntimeError"
    assert failure_message(BrokenPipeError(32, "Broken pipe")) is None
    assert failure_message(KeyError("a bug")) is None


def test_a_closed_pipe_ends_quietly(environment):
    done = subprocess.run(
        f"'{sys.executable}' -m pyengine chat --help | true",
        shell=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
