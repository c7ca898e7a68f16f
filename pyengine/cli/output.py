"""Everything the commands print besides the model's own text: spinners, the status line, the table of statistics."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pyengine import Llama
    from pyengine.cli.conversation import Figures

DIM, STRONG, ERROR = "dim", "bold", "red"


def console(*, stderr: bool) -> Console:
    """A console for plain text: no markup, no highlighting, long lines wrapped on a terminal only."""
    from rich.console import Console

    wrapped = is_terminal(sys.stderr if stderr else sys.stdout)
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=not wrapped)


def style(name: str) -> str:
    """`name`, or no style at all when the user set NO_COLOR."""
    return "" if os.environ.get("NO_COLOR") else name


def notice(text: str) -> None:
    """One line on standard error that is not part of any answer."""
    console(stderr=True).print(text, style=style(DIM))


class TerminalSpinner:
    """A line with a spinner and the elapsed time on standard error; shows nothing when that is not a terminal.

    It writes to a descriptor of its own, because llama_cpp redirects descriptors 1 and 2 to nowhere while it loads.
    """

    def __init__(self, text: str | Callable[[], str]) -> None:
        """`text` may be a function; the thread that draws calls it a few times a second."""
        self._text = text if callable(text) else lambda: text
        self._stack = contextlib.ExitStack()
        self._file: io.TextIOWrapper | None = None

    def __enter__(self) -> TerminalSpinner:
        if not is_terminal(sys.stderr):
            return self
        from rich.console import Console
        from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
        from rich.text import Text
        from rich.theme import Theme

        text = self._text

        class Line(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(text(), style=style(DIM))

        descriptor = os.dup(sys.stderr.fileno())
        self._file = self._stack.enter_context(os.fdopen(descriptor, "w", encoding=sys.stderr.encoding))
        progress = Progress(
            SpinnerColumn(style=style("cyan")),
            Line(),
            TimeElapsedColumn(),
            console=Console(
                file=self._file,
                force_terminal=True,
                theme=Theme({"progress.elapsed": style(DIM) or "none"}),
            ),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        progress.add_task("", total=None)
        self._stack.enter_context(progress)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away. May be called again."""
        self._stack.close()

    def restore_terminal(self) -> None:
        """Clear the line and show the cursor, without waiting for the thread that draws: for a sudden exit."""
        if self._file is not None:
            os.write(self._file.fileno(), b"\r\x1b[2K\x1b[?25h\n")


def reading_prompt(llm: Llama, total: int | None = None) -> TerminalSpinner:
    """The spinner for the time before the first token, with the prompt tokens computed so far (batch by batch)."""

    def text() -> str:
        done = f"{llm.n_tokens} of {total}" if total is not None else f"{llm.n_tokens}"
        return f"Reading the prompt, {done} tokens" if llm.n_tokens else "Reading the prompt"

    return TerminalSpinner(text)


def line_end(text: str) -> str:
    """What must follow `text` so that the next line starts at the left."""
    return "" if text[-1:] in ("", "\n") else "\n"


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream exists, is open and is a terminal."""
    return stream is not None and not stream.closed and bool(stream.isatty())


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Inside the block typed keys, ^C among them, are not echoed into the answer; they wait for the next prompt."""
    try:
        import termios
    except ImportError:  # not a POSIX system
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def format_bytes(count: float) -> str:
    """`count` bytes with a binary unit, three significant digits: "29.9 MiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    whole = units[0] == "bytes" or abs(count) >= 100
    return f"{count:.0f} {units[0]}" if whole else f"{count:.3g} {units[0]}"


def format_percent(part: float, whole: float) -> str:
    """The share of `part` in `whole`, three significant digits: "83.1 %"; "-" of nothing."""
    return f"{100 * part / whole:.3g} %" if whole else "-"


def status_line(figures: Figures) -> str:
    """One line about one answer: speed, time to first token, hit rate, resident share; fits 80 columns.

    The context is mentioned once half of it is used.
    """
    parts = [f"{figures.tokens} token{'' if figures.tokens == 1 else 's'}"]
    if figures.tokens_per_s is not None:
        parts.append(f"{figures.tokens_per_s:.1f} tok/s")
    if figures.first_token_s is not None:
        parts.append(f"first token {figures.first_token_s:.2f} s")
    stats = figures.stats
    if stats.get("managed", True) and stats.get("experts"):
        parts.append(f"hit rate {format_percent(figures.hits, figures.hits + figures.misses)}")
        parts.append(f"resident {format_percent(stats['resident'], stats['experts'])}")
    if figures.context_used > figures.context_size / 2:
        parts.append(f"context {format_percent(figures.context_used, figures.context_size)}")
    return " · ".join(parts)


def stats_table(stats: Mapping[str, Any]) -> Table:
    """expert_stats() for a reader: the figures everyone asks for first, then whatever else it holds."""
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    table.add_column(style=style(DIM))
    table.add_column()
    for name, value in _stats_rows(dict(stats)):
        table.add_row(name, value)
    return table


def _stats_rows(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not stats.pop("managed", True):
        yield "experts", "none to manage"
        return
    if {"resident", "experts", "resident_bytes"} <= stats.keys():
        resident, experts = stats.pop("resident"), stats.pop("experts")
        share = format_percent(resident, experts)
        yield "resident", f"{resident} of {experts} experts ({share}), {format_bytes(stats.pop('resident_bytes'))}"
    if {"budget_bytes", "slots"} <= stats.keys():
        yield "budget", f"{format_bytes(stats.pop('budget_bytes'))}, {stats.pop('slots')} slots"
    for part in stats.pop("gpus", ()):
        budget = f"{format_bytes(part['budget_bytes'])}, {part['slots']} slots"
        yield f"on {part['name']}", f"{budget}, {part['n_layer']} layers"
    if {"hits", "misses"} <= stats.keys():
        hits, misses = stats.pop("hits"), stats.pop("misses")
        stats.pop("hit_rate", None)
        yield "hit rate", f"{format_percent(hits, hits + misses)} ({hits} hits, {misses} misses)"
    if "bytes_read" in stats:
        reads = f" in {stats.pop('reads')} reads" if "reads" in stats else ""
        yield "read from disk", format_bytes(stats.pop("bytes_read")) + reads
    for name, label in (("stall_seconds", "waited for disk"), ("compute_seconds", "computed experts")):
        if name in stats:
            yield label, f"{stats.pop(name):.2f} s"
    for name, value in stats.items():
        yield name.replace("_", " "), _plain(name, value)


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name or name.endswith("budget"):
        return format_bytes(value)
    if name.endswith(("_seconds", "_s")):
        return f"{value:.2f} s"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
