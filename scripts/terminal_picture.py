"""Make docs/chat.svg: a real conversation with the bundled model, as it stands in a terminal. Needs tmux.

.venv/bin/python scripts/terminal_picture.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 100, 34
SESSION = "pyengine-picture"
TYPED = ("What is the capital of France?", "Give me three tips for staying healthy.", "/stats")


def tmux(*arguments: str) -> str:
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def settled(patience: float = 3.0, limit: float = 120.0) -> str:
    """The screen, once it has not changed for `patience` seconds."""
    deadline, before, since = time.monotonic() + limit, "", time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < patience:
        time.sleep(0.3)
        now = tmux("capture-pane", "-p", "-e", "-t", SESSION)
        if now != before:
            before, since = now, time.monotonic()
    return before


def main() -> None:
    command = f"{Path(sys.executable).parent / 'pyengine'} chat --ram-budget 50% --temp 0"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", str(ROWS), command)
    try:
        screen = settled()
        for line in TYPED:
            tmux("send-keys", "-t", SESSION, "-l", line)
            tmux("send-keys", "-t", SESSION, "Enter")
            screen = settled()
    finally:
        subprocess.run(["tmux", "kill-session", "-t", SESSION], check=False, capture_output=True)
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text.from_ansi(screen.rstrip()))
    (ROOT / "docs").mkdir(exist_ok=True)
    console.save_svg(str(ROOT / "docs" / "chat.svg"), title="pyengine chat --ram-budget 50%")


if __name__ == "__main__":
    main()
