"""Starts the process of one sample inside its control groups and waits for it, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.bench.cgroups import Groups, MemoryUse

#: The shell enters the groups before Python starts, so that they see every byte.
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
#: The shell's exit code then.
NOT_ENTERED = 125


@dataclass(frozen=True)
class Outcome:
    """What became of a process.

    Attributes:
        status: "ok", "out of memory", "timed out", "not limited" (it could not enter its control group and never ran),
            "unsupported" or "failed".
        reason: a sentence, unless ok.
        result: what it printed, empty unless ok.
    """

    status: str
    reason: str
    result: Mapping[str, Any]
    memory: MemoryUse


def command_of(module: str, groups: Groups) -> list[str]:
    """The command that runs `python -m module` inside the control groups."""
    command = [sys.executable, "-m", module]
    if groups.folders:
        command = ["/bin/sh", "-c", _ENTER, "sh", *map(str, groups.entrances), "--", *command]
    return command


def launch(module: str, task: Mapping[str, Any], groups: Groups, timeout_s: float) -> Outcome:
    """Run `python -m module` with the task as JSON on its standard input; its last line of output is its result.

    Ctrl-C and every other exception kill the process before they go on.
    """
    with tempfile.TemporaryDirectory(prefix="pyengine-bench-") as folder:  # for what a killed process would leave
        return _launch(module, task, groups, timeout_s, folder)


def _launch(module: str, task: Mapping[str, Any], groups: Groups, timeout_s: float, folder: str) -> Outcome:
    # A session of its own: Ctrl-C reaches this process only, which then ends the child.
    process = subprocess.Popen(
        command_of(module, groups),
        env=os.environ | {"TMPDIR": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(json.dumps(task), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return Outcome("timed out", f"not done after {timeout_s:.0f} s", {}, groups.memory_use())
    except BaseException:
        _end(process)
        raise
    memory = groups.memory_use()
    if process.returncode == -signal.SIGKILL and memory.kills:
        phase = (errors.split() or ["load"])[-1]
        return Outcome("out of memory", f"killed at the memory limit (phase: {phase})", {}, memory)
    if process.returncode == NOT_ENTERED and groups.folders:
        return Outcome("not limited", f"no cgroup: {last_line(errors)}", {}, memory)
    try:
        result = json.loads(last_line(output))
    except ValueError:
        return Outcome("failed", f"exit code {process.returncode}: {last_line(errors)}", {}, memory)
    status = result.get("status", "ok")
    return Outcome(status, result.get("reason", ""), result if status == "ok" else {}, memory)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def last_line(text: str) -> str:
    """The last line of a text, empty if there is none."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
