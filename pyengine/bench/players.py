"""Processes that each hold one model loaded one way and decode when it is their turn, so that two ways can be compared
within seconds, warm, as often as need be, and with one disk limit after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pyengine.bench.cgroups import Groups
from pyengine.bench.child import Task
from pyengine.bench.launch import NOT_ENTERED, command_of, last_line
from pyengine.errors import PyengineError

#: Seconds that a player has to end when its input ends.
_POLITE_S = 5.0


class GoneError(Exception):
    """A player has ended. status, reason: as in launch.Outcome."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Player:
    """One process (player_child.py) in its control groups.

    Attributes:
        groups: its control groups, whose disk limit may be changed between turns.
        transcript: number of a text -> the token ids decoded in it so far.
        budget: bytes of slots after loading; 0 for stock.
    """

    def __init__(self, task: Task, groups: Groups, limit_s: float) -> None:
        """Load the model, within `limit_s` seconds. Raises GoneError, and PyengineError if a stock row is not stock."""
        self.groups = groups
        self.transcript: dict[int, list[int]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="pyengine-bench-")  # for what a killed process would leave
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115  (it lives as long as this)
        # A session of its own: Ctrl-C reaches the benchmark only, which then ends its players.
        self._process = subprocess.Popen(
            command_of("pyengine.bench.player_child", groups),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"TMPDIR": self._folder.name},
            start_new_session=True,
            text=True,
        )
        try:
            ready = self._ask(asdict(task), limit_s)
            if ready["status"] != "ok":
                raise GoneError(ready["status"], ready["reason"])
            self.budget = int(ready["budget"])
            if task.kind.startswith("stock") and ready["libraries"]:
                raise PyengineError("a stock row has loaded pyengine's native part; its figures would not be stock's")
        except BaseException:
            self.end()
            raise

    def turn(self, steps: int, limit_s: float, patience_s: float, text: int | None = None) -> Mapping[str, Any]:
        """Decode `steps` more tokens, fewer after `limit_s` seconds.

        Args:
            text: a number that no text of it had before, for a new one; its prompt is not timed.
            patience_s: seconds after which a player that gives no answer, not even one token, is ended.

        Returns:
            The phase, see measuring.Phase.as_dict().

        Raises:
            GoneError: it has ended.
        """
        answer = self._ask({"steps": steps, "limit_s": limit_s, "text": text}, patience_s)
        if "phase" not in answer:
            raise GoneError(answer["status"], answer["reason"])
        self.transcript.setdefault(answer["text"], []).extend(answer["tokens"])
        phase: Mapping[str, Any] = answer["phase"]
        return phase

    def end(self) -> None:
        """End the process, politely at first. Harmless when repeated."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(_POLITE_S)
        self._kill()
        self._process.wait()
        self._folder.cleanup()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it never read is lost
                    pipe.close()

    def _kill(self) -> None:
        """With what it has started: the judging of policies."""
        if self._process.returncode is None:  # not waited for yet, so that its number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, question: Mapping[str, Any], patience_s: float) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(patience_s, give_up)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        said = last_line(self._errors.read())
        if late.is_set():
            raise GoneError("timed out", f"not one token in {patience_s:.0f} s")
        if self.groups.memory_use().kills:
            raise GoneError("out of memory", "killed at the memory limit")
        if code == NOT_ENTERED and self.groups.folders:
            raise GoneError("not limited", f"no cgroup: {said}")
        raise GoneError("failed", f"exit code {code}: {said}")
