"""Processes of gpu_worker.py, as their parent sees them: started together, asked in turn, ended if they take too
long."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_rows

#: Seconds that loading may take, while others load too.
LOAD_S = 120.0


class GoneError(Exception):
    """The process has ended, or was ended because it did not answer in time; the message says which."""


class Player:
    """One row's process; its facts (gpu_worker.Worker.facts) are there after ready()."""

    def __init__(self, row: gpu_rows.Row, task: dict[str, Any]) -> None:
        self.row = row
        self.facts: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._send(task | {"row": row, "ours": not row.stock})

    def ready(self, seconds: float = LOAD_S) -> dict[str, Any]:
        """Wait until the model is loaded. Raises GoneError."""
        self.facts = self._answer(seconds)
        if "error" in self.facts:
            self.end()
            raise GoneError(self.facts["error"])
        return self.facts

    def ask(self, do: str, limit_s: float, **arguments: Any) -> dict[str, Any]:
        """Raises GoneError. An answer with "error" says what went wrong in a process that lives on."""
        self._send({"do": do} | arguments)
        return self._answer(limit_s)

    def end(self) -> None:
        """Harmless when repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self.end()
                raise GoneError(f"no answer in {seconds:.0f} s")
            part = self._process.stdout.read1()
            if not part:
                raise self._gone()
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> GoneError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        self.end()
        # What went wrong comes before the stack that a library prints.
        wrong = next((said[i : i + 6] for i, line in enumerate(said) if "error" in line.lower()), said[-4:])
        return GoneError(f"ended with {code}: {' / '.join(wrong)[:900]}")


def start(rows: list[gpu_rows.Row], task: dict[str, Any]) -> list[Player]:
    """All of them, loading at the same time; those that cannot are left out, and it is said why."""
    players, ready = [Player(row, task) for row in rows], []
    for player in players:
        try:
            player.ready()
            ready.append(player)
        except GoneError as error:
            print(f"{player.row}: {error}", flush=True)
    return ready
