"""What becomes of a sample's process is an outcome, not an exception; and nothing survives the benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pyengine.bench.cgroups import Groups
from pyengine.bench.launch import launch


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of the given source and returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source):
        (tmp_path / "launched_module.py").write_text(source)
        return "launched_module"

    return make


def test_task_goes_in_and_result_comes_out(module):
    name = module(
        "import json, sys; task = json.load(sys.stdin); print('chatter'); print(json.dumps({'twice': 2 * task['n']}))"
    )
    outcome = launch(name, {"n": 21}, Groups(), 60)
    assert (outcome.status, outcome.result) == ("ok", {"twice": 42})


def test_a_child_may_say_that_it_cannot(module):
    name = module("""print('{"status": "unsupported", "reason": "no such thing"}')""")
    outcome = launch(name, {}, Groups(), 60)
    assert (outcome.status, outcome.reason, outcome.result) == ("unsupported", "no such thing", {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; print('GGML_ASSERT failed', file=sys.stderr); sys.exit(3)", "exit code 3: GGML_ASSERT failed"),
        ("print('no json')", "exit code 0: "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", f"exit code -{signal.SIGSEGV.value}: "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", f"exit code -{signal.SIGKILL.value}: "),
    ],
)
def test_a_crash_is_a_failure_with_its_last_words(module, source, reason):
    outcome = launch(module(source), {}, Groups(), 60)
    assert (outcome.status, outcome.reason) == ("failed", reason)


def test_a_group_that_cannot_be_entered_is_not_limited(module, tmp_path):
    missing = tmp_path / "gone"
    outcome = launch(module("print('{}')"), {}, Groups([missing]), 60)
    assert outcome.status == "not limited"
    assert outcome.reason.startswith("no cgroup: ")
    assert outcome.result == {}


def test_the_group_is_entered_before_python_starts(module, tmp_path):
    group = tmp_path / "group"
    group.mkdir()
    name = module("import json, os; print(json.dumps({'pid': os.getpid()}))")
    outcome = launch(name, {}, Groups([group]), 60)
    assert (group / "cgroup.procs").read_text().split() == [str(outcome.result["pid"])]


def test_too_slow_is_killed(module, tmp_path):
    name = module(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    outcome = launch(name, {}, Groups(), 2)
    assert outcome.status == "timed out"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_interrupt_kills_the_child(module, tmp_path):
    """The child is in a session of its own, so only the parent hears Ctrl-C."""
    pid_file = tmp_path / "pid"
    name = module(f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    # A shell's background job ignores SIGINT, and what it starts inherits that.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from pyengine.bench.launch import *; launch({name!r}, {{}}, Groups(), 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    try:
        child = _pid_in(pid_file)
        os.killpg(parent.pid, signal.SIGINT)
        _, errors = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert not psutil.pid_exists(child)


def _pid_in(file):
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(file.read_text())
