"""Ctrl-C at any moment: the process ends at once, with exit code 130, and says nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

# Moments are shares of the time that a run takes when nothing disturbs it.
pytestmark = pytest.mark.alone

TRIES = 16
TIME_LIMIT_S = 60.0
LONG_PROMPT = "Once upon a time there was a fox who lived near the river. " * 6

# Before this line runs there is only Python's own start, where a signal ends in its words or none.
PROGRAM = "import os; from pyengine.__main__ import entry; os.write(2, b'started\\n'); entry()"
ARGUMENTS = ["run", "-p", LONG_PROMPT, "-n", "24", "-t", "1", "-c", "1024", "--ram-budget", "25%", "--temp", "0"]


class Run:
    """The command line in a process of its own, over the bundled model."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *ARGUMENTS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment | {"TMPDIR": str(folder)},
        )
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == b"started\n"
        self.started_at = time.monotonic()

    def end(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) once it has ended; fails if it hangs."""
        try:
            out, err = self.process.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            pytest.fail("it hangs")
        return self.process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, str]:
    """Seconds from start to end without Ctrl-C, and the text."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    code, out, _ = run.end()
    assert code == 0
    return time.monotonic() - run.started_at, out


@pytest.mark.parametrize("attempt", range(TRIES))
def test_at_any_moment(attempt: int, undisturbed: tuple[float, str], tmp_path: Path) -> None:
    whole_s, text = undisturbed
    share = (attempt + random.Random(attempt).random()) / TRIES  # every part of the run gets its turn
    run = Run(tmp_path)
    time.sleep(max(0.0, run.started_at + share * whole_s - time.monotonic()))
    run.process.send_signal(signal.SIGINT)
    sent_at = time.monotonic()
    code, out, err = run.end()
    assert "Traceback" not in err, err
    # Once all is done Python takes its handler away, and the signal ends the process itself; shells call both 130.
    assert code in (0, 130) or (code == -signal.SIGINT and out == text), err
    assert text.startswith(out.removesuffix("\n"))
    assert "error" not in err, err
    assert time.monotonic() - sent_at < max(5.0, whole_s)
    assert not list(tmp_path.iterdir())


def test_twice_in_a_row(undisturbed: tuple[float, str], tmp_path: Path) -> None:
    run = Run(tmp_path)
    time.sleep(undisturbed[0] / 2)
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    code, _, err = run.end()
    assert code == 130, err
    assert "Traceback" not in err, err


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05])
def test_while_python_itself_starts(delay_s: float, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pyengine", *ARGUMENTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode in (130, 1, -signal.SIGINT)
    assert out == b""


def test_between_the_turns_of_a_chat(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    chat = pexpect.spawn(
        sys.executable,
        ["-m", "pyengine", "chat", "-t", "1", "-c", "512", "--temp", "0", "--ram-budget", "25%", "-n", "12"],
        env=dict(environment),
        timeout=TIME_LIMIT_S,
        encoding="utf-8",
    )
    try:
        for _ in range(2):
            chat.expect("> ")
            time.sleep(0.2)  # keys are bound a moment after the prompt is drawn
            chat.send("\x03")
        chat.expect("> ")
        time.sleep(0.2)
        chat.send("What is the capital of France?\r")
        chat.expect("Paris")
        chat.expect("tok/s")
        chat.expect("> ")
        time.sleep(0.2)
        chat.send("\x03")
        time.sleep(0.2)
        chat.send("\x04")
        chat.expect(pexpect.EOF)
        chat.close()
        assert chat.exitstatus == 0
        assert chat.signalstatus is None
    finally:
        chat.close(force=True)
