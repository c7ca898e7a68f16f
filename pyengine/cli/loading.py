"""Opens the model a command asked for, behind a spinner, and closes it for sure."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyengine.cli.bundle_offer import bundle_made_meanwhile
from pyengine.cli.interrupt import exit_on_interrupt
from pyengine.cli.options import ModelOptions
from pyengine.cli.output import TerminalSpinner, notice

if TYPE_CHECKING:
    from pyengine import Llama


class PlainMessages(logging.Handler):
    """Shows what the package logs as plain lines on standard error.

    Until show_kept() it keeps them, because while a model loads llama_cpp redirects the descriptor and a spinner runs.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._kept is None:
            notice(record.getMessage())
        else:
            self._kept.append(record.getMessage())

    def show_kept(self, said_elsewhere: str = "") -> None:
        """Show what was kept, except for a line that the command prints itself, and from now on show all at once."""
        kept, self._kept = self._kept or [], None
        for line in kept:
            if line != said_elsewhere:
                notice(line)


@contextlib.contextmanager
def opened(options: ModelOptions) -> Iterator[tuple[Llama, float]]:
    """The model and the seconds it took to load; closed when the block ends. Ctrl-C while loading ends the process.

    Raises:
        PyengineError: the model cannot be loaded as asked.
        ValueError: llama.cpp refuses an argument.
    """
    messages = PlainMessages()
    log = logging.getLogger("pyengine")
    log.addHandler(messages)
    try:
        llm, seconds = _load(options)
        messages.show_kept(said_elsewhere=llm.engaged)
        try:
            with bundle_made_meanwhile(llm, options):
                yield llm, seconds
        finally:
            llm.close()
    finally:
        messages.show_kept()
        log.removeHandler(messages)


def _load(options: ModelOptions) -> tuple[Llama, float]:
    name = options.model.name if options.model else "the bundled model"
    spinner = TerminalSpinner(f"Loading {name}")
    with spinner, exit_on_interrupt(spinner.restore_terminal):
        # Imported behind the spinner: numpy and llama.cpp's libraries take a noticeable part of a second.
        from pyengine import Llama

        started = time.perf_counter()
        llm = Llama(options.model, **options.arguments())
        return llm, time.perf_counter() - started


def engaged_line(llm: Llama) -> str:
    """What is kept where; with a GPU also how fast its memory is filled from RAM, measured once per machine."""
    name = llm.expert_stats().get("gpu")
    if name is None:
        return llm.engaged
    from pyengine import vram
    from pyengine.planning.link import known_link

    device = vram.find(name)
    link = known_link(device)
    if device.unified:
        return f"{llm.engaged}, unified memory"
    return llm.engaged if link is None else f"{llm.engaged}, link {link.bytes_per_s / 1e9:.3g} GB/s"
