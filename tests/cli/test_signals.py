"""Ctrl-C at any moment of a program that is not interactive: exit code 130, nothing but whole output, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pseudo_terminal import FAKE_MAIN, TIMEOUT_S

from pyengine.cli.interrupt import StopRequest

# Signals come some time after a start, at moments that a busy machine would shift.
pytestmark = pytest.mark.alone


class Child:
    """The command line over FakeLlama with its output in pipes."""

    def __init__(self, environment, *arguments, **script):
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_MAIN), *arguments],
            env=environment | {"FAKE_LLAMA": json.dumps(script)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt(self):
        """SIGINT now; (exit code, rest of stdout, rest of stderr, seconds until the end)."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err, time.monotonic() - started


def test_while_loading(environment):
    child = Child(environment, "run", "-p", "x", load_delay_s=20)
    time.sleep(2)
    code, out, err, seconds = child.interrupt()
    assert (code, out, err) == (130, "", "")
    assert seconds < 5


@pytest.mark.parametrize("arguments", [["run", "-p", "a b"], ["run", "-p", "a b", "--json"], ["chat", "-p", "a b"]])
def test_while_generating(environment, arguments):
    script = {"completion": ["x"], "answers": ["word " * 1000], "token_delay_s": 0.05}
    if arguments[0] == "run":
        script = {"prompt_delay_s": 1.0}
    child = Child(environment, *arguments, **script)
    assert child.process.stderr.readline().startswith("30 layers")
    time.sleep(0.3)
    code, out, err, _ = child.interrupt()
    assert code == 130
    assert err == ""
    assert "{" not in out  # no half report


def test_a_stop_request_sets_a_flag_and_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(object()) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
        assert stop.expected(RuntimeError("llama_decode returned 2"))
        assert not stop.expected(ValueError())
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_sigint_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(object()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
