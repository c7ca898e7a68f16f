"""Run a command with its output in a log file; show one line while it runs, and the end of the log if it fails.

    python quietly.py LABEL LOG COMMAND...

A command that is done at once shows nothing. While a build tool prints [12/345] the line shows how far it is. Exits as
the command did. Needs only the standard library.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

TAIL_LINES = 30
# Steps that take less say nothing: a second `make` has nothing to do and should look like it.
SECONDS_BEFORE_LABEL = 1.5
# Without a terminal, one line now and then tells that a long step is alive.
SECONDS_BETWEEN_LINES = 60.0
_STEPS = re.compile(rb"\[ *(\d+)/(\d+)\]")


class Display:
    """One line about a step: rewritten in place on a terminal, a new line a minute elsewhere."""

    def __init__(self, label: str, out: TextIO) -> None:
        self._label, self._out = label, out
        self._terminal = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._started = time.monotonic()
        self._steps = ""
        self._shown = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    def progress(self, done: int, total: int) -> None:
        self._steps = f" {done}/{total}"

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        if self._shown and self._terminal:
            self._write(f"\r\033[K{self._label} ({self._seconds():.0f} s)\n")

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _refresh(self) -> None:
        if self._over.wait(SECONDS_BEFORE_LABEL):
            return
        self._shown = True
        self._write(self._label if self._terminal else f"{self._label}\n")
        while not self._over.wait(1.0 if self._terminal else SECONDS_BETWEEN_LINES):
            if self._terminal:
                self._write(f"\r\033[K{self._label}{self._steps}")
            else:
                self._write(f"    {self._seconds():.0f} s{self._steps}\n")


def run(command: list[str], label: str, log: Path, out: TextIO = sys.stdout) -> int:
    """Run the command and return its exit status (128 + signal if a signal ended it)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    display = Display(label, out)
    # A Ctrl-C reaches the command too, since it shares our process group; we wait for it and report its end.
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    with log.open("wb") as sink:
        sink.write(f"$ {shlex.join(command)}\n".encode())
        sink.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        for line in process.stdout:
            sink.write(line)
            sink.flush()
            found = _STEPS.search(line)
            if found:
                display.progress(int(found[1]), int(found[2]))
        status = process.wait()
    signal.signal(signal.SIGINT, interrupt)
    display.close()
    if status < 0:
        status = 128 - status
    if status == 128 + signal.SIGINT:
        print("interrupted", file=sys.stderr)
    elif status != 0:
        print(f"failed: {label}. The last lines of {log}:", file=sys.stderr)
        for text in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            print(f"    {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[3:], sys.argv[1], Path(sys.argv[2])))
