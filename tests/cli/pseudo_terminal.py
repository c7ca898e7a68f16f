"""A terminal for tests: a program in a pseudo-terminal, and the screen as its user sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pexpect
import pyte

FAKE_MAIN = Path(__file__).with_name("fake_main.py")
COLUMNS, ROWS = 100, 200  # so many rows that nothing scrolls away
TIMEOUT_S = 30.0  # generous: the machine may be busy


class Terminal:
    """Runs one program; type keys into it and wait for what appears below the place where they were typed."""

    def __init__(self, command: list[str], environment: Mapping[str, str], directory: str) -> None:
        self._child = pexpect.spawn(
            command[0],
            command[1:],
            env=dict(environment),
            cwd=directory,
            dimensions=(ROWS, COLUMNS),
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )
        self._child.delaybeforesend = None
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)
        self._mark = 0
        self.raw = ""

    def type(self, keys: str) -> None:
        """Send `keys` once the prompt is ready for them; later waits look from this row on."""
        self._mark = self._screen.cursor.y
        self._child.send(keys)

    def enter(self, line: str) -> None:
        """Wait for an empty prompt, then type a line into it."""
        self.wait_for_prompt()
        self.type(line + "\r")

    def wait_for_prompt(self) -> None:
        """Wait until the last line on the screen is an empty prompt and the cursor stands in it."""
        self.wait_until(lambda: self.lines[-1:] == [">"] and self._screen.cursor.x == 2, "a prompt")
        time.sleep(0.05)  # keys are bound a moment after it is drawn

    def wait_for(self, text: str) -> None:
        """Wait until `text` is on the screen, at or below the row of the last typed keys."""
        self.wait_until(lambda: text in "\n".join(self.lines_since), repr(text))

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline or not self._read():
                raise AssertionError(f"waited in vain for {what}; the screen:\n{self}")

    def finish(self) -> int | None:
        """Wait for the program's end; its exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read():
            assert time.monotonic() < deadline, f"does not end; the screen:\n{self}"
        self._child.close()
        code: int | None = self._child.exitstatus
        return code

    def kill(self) -> None:
        self._child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """The screen without trailing blanks and empty last lines."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def lines_since(self) -> list[str]:
        """The lines at and below the row of the last typed keys."""
        return self.lines[self._mark :]

    @property
    def cursor_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    def styled(self) -> set[str]:
        """The colours and attributes that visible characters on the screen have."""
        found = set()
        for row in self._screen.buffer.values():
            for cell in row.values():
                if cell.data.strip():
                    found |= {colour for colour in (cell.fg, cell.bg) if colour != "default"}
                    found |= {name for name in ("bold", "italics", "underscore", "reverse") if getattr(cell, name)}
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def _read(self) -> bool:
        """Take what has come, waiting a little; False when the program has closed the terminal."""
        try:
            data = self._child.read_nonblocking(65536, timeout=0.05)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True
