"""Breaks streamed text at word boundaries to fit a terminal."""

from __future__ import annotations

import re
import shutil

# Control characters, which a model may emit and which could rewrite the screen; tab and newline stay.
_CONTROL = dict.fromkeys((*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)))
_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
_FENCE = "```"


class WordWrap:
    """Turns pieces of text into pieces to print, never breaking a word that fits on a line.

    A word is held back until its end is known, so what comes out lags by at most one word. Lines of fenced code are
    left as they are, because a newline in them would be pasted with them.
    """

    def __init__(self, width: int | None = None) -> None:
        self._width = width  # None: ask the terminal, again for every piece, for it may be resized
        self._held = ""  # blanks and the beginning of a word, not laid out yet
        self._column = 0
        self._first_word = ""  # of the present line
        self._in_code = False

    def feed(self, text: str) -> str:
        """What can be printed now that `text` has come."""
        parts = _PARTS.findall(self._held + text.translate(_CONTROL))
        complete = len(parts)
        while complete and parts[complete - 1] != "\n" and len(parts) - complete < 2:
            complete -= 1
            if parts[complete].isspace():
                break
        self._held = "".join(parts[complete:])
        return self._lay_out(parts[:complete])

    def finish(self) -> str:
        """The rest, when no more text comes."""
        parts = _PARTS.findall(self._held)
        self._held = ""
        return self._lay_out(parts)

    def _lay_out(self, parts: list[str]) -> str:
        from rich.cells import cell_len

        width = self._width or shutil.get_terminal_size().columns
        out = []
        blank = ""
        for part in parts:
            if part == "\n":
                out.append("\n")
                self._end_line()
                blank = ""
            elif part.isspace():
                blank = part
            else:
                cells = cell_len((blank + part).expandtabs(8))
                if self._in_code or self._column + cells <= width or self._column == 0:
                    out.append(blank + part)
                    self._column += cells
                else:
                    out.append("\n" + part)
                    self._column = cell_len(part)
                self._first_word = self._first_word or part
                blank = ""
        return "".join(out)

    def _end_line(self) -> None:
        if self._first_word.startswith(_FENCE):
            self._in_code = not self._in_code
        self._first_word = ""
        self._column = 0
