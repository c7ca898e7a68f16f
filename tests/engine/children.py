"""Things that tests must do in a process of their own, and how to start one.

Run as a module, this is the process: the name of a function under tasks/ ("forks.fork_memory") and its arguments
(JSON); it answers with the last line it prints.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]


class Child:
    """A process that does one task."""

    def __init__(self, task: str, **arguments: Any) -> None:
        self._command = [sys.executable, "-m", f"{__package__}.children", task, json.dumps(arguments)]

    def start(self, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start it, with more environment variables."""
        return subprocess.Popen(
            self._command,
            cwd=_TESTS,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, environment: dict[str, str] | None = None, timeout: float = 120) -> dict[str, Any]:
        """What it answers. Fails with its error output if it fails."""
        with self.start(environment) as process:
            try:
                out, error = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, f"exit status {process.returncode}\n{error}"
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def _main() -> None:
    module, _, function = sys.argv[1].partition(".")
    task = getattr(importlib.import_module(f"{__package__}.tasks.{module}"), function)
    print(json.dumps(task(**json.loads(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    _main()
