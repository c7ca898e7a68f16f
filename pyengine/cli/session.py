"""The interactive chat: line editing, slash commands, answers that Ctrl-C stops."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.shortcuts import CompleteStyle
from rich.table import Table

from pyengine.cli import failure_message, installed_version
from pyengine.cli.conversation import Conversation
from pyengine.cli.interrupt import StopRequest
from pyengine.cli.loading import engaged_line
from pyengine.cli.options import budget
from pyengine.cli.output import (
    DIM,
    ERROR,
    STRONG,
    console,
    line_end,
    notice,
    quiet_keyboard,
    reading_prompt,
    stats_table,
    status_line,
    style,
)
from pyengine.cli.transcript import save_transcript
from pyengine.cli.wordwrap import WordWrap
from pyengine.errors import PyengineError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent

    from pyengine import Llama


class SlashCommand(NamedTuple):
    run: Callable[[str], None]
    argument: str
    help: str


class Session:
    """One interactive chat with one model."""

    def __init__(self, llm: Llama, conversation: Conversation) -> None:
        self._llm = llm
        self._conversation = conversation
        self._screen = console(stderr=False)
        self._commands = {
            "/help": SlashCommand(self._help, "", "show this list"),
            "/stats": SlashCommand(self._stats, "", "what the experts did so far"),
            "/reset": SlashCommand(self._reset, "", "forget the conversation, keep the system prompt"),
            "/budget": SlashCommand(self._budget, "SIZE", "change the memory for experts: 50%, 2GiB, bytes, auto"),
            "/system": SlashCommand(self._system, "TEXT", "set the system prompt; without TEXT show it"),
            "/save": SlashCommand(self._save, "FILE", "save the conversation, as JSON if FILE ends in .json"),
            "/quit": SlashCommand(self._quit, "", "leave, as Ctrl-D does"),
        }
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_key_bindings(),
            completer=_SlashCompleter(self._commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # needs no empty lines below the prompt
            prompt_continuation=lambda width, *_: " " * width,
            enable_suspend=True,
        )

    def run(self) -> None:
        """Talk until the user leaves."""
        self._greet()
        while True:
            try:
                with patch_stdout(raw=True):  # a message from another thread goes above the prompt
                    text = self._prompt.prompt(FormattedText([(style("bold ansicyan"), "> ")]))
                if text.startswith("/"):
                    self._obey(text)
                elif text.strip():
                    self._answer(text.strip())
            except KeyboardInterrupt:
                if not self._prompt.default_buffer.text.strip():
                    self._say("Ctrl-D or /quit leaves.")
            except EOFError:
                return

    def _greet(self) -> None:
        name = Path(self._llm.model_path).name.removesuffix(".gguf")
        self._screen.print(f"pyengine {installed_version('pyengine')} · {name}", style=style(STRONG))
        notice(engaged_line(self._llm))
        self._say("/help lists commands · Ctrl-C stops an answer · Ctrl-D leaves")
        self._screen.print()

    def _answer(self, text: str) -> None:
        self._screen.print()
        try:
            with quiet_keyboard(), StopRequest(self._llm) as stop:
                self._stream(text, stop)
        except (PyengineError, ValueError, RuntimeError) as error:
            self._complain(error)
        self._screen.print()

    def _stream(self, text: str, stop: StopRequest) -> None:
        conversation, wrap = self._conversation, WordWrap()
        answer = conversation.ask(text, stop)
        with reading_prompt(self._llm) as spinner:
            try:
                for piece in answer:
                    if piece == answer.text:  # the first one: now it is known whether the conversation fits
                        spinner.stop()
                        if conversation.dropped:
                            self._say(_dropped(conversation.dropped))
                    print(wrap.feed(piece), end="", flush=True)
            finally:
                print(wrap.finish(), end=line_end(answer.text), flush=True)
        conversation.record(text, answer)
        if answer.text:
            self._screen.print()
        if answer.stopped:
            self._say("(stopped)" if answer.text else "(stopped before the first word; your message is forgotten)")
        elif answer.finish_reason == "length" and answer.figures.context_used + 1 >= answer.figures.context_size:
            self._say(f"(cut off: the context of {answer.figures.context_size} tokens is full; -c sets its size)")
        self._say(status_line(answer.figures))

    def _say(self, text: str) -> None:
        self._screen.print(text, style=style(DIM))

    def _complain(self, error: Exception) -> None:
        self._screen.print(f"error: {failure_message(error)}", style=style(ERROR))

    def _obey(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        slash = self._commands.get(name.strip())
        if slash is None:
            self._say(f"no command {name.strip()}; /help lists them. To send such a message start it with a space.")
        else:
            try:
                slash.run(argument.strip())
            except (PyengineError, ValueError, RuntimeError, OSError) as error:
                self._complain(error)
        self._screen.print()

    def _help(self, _argument: str) -> None:
        table = Table.grid(padding=(0, 3))
        table.add_column(style=style("cyan"))
        table.add_column()
        for name, slash in self._commands.items():
            table.add_row(f"{name} {slash.argument}", slash.help)
        table.add_row("Alt-Enter", "start a new line; pasted lines stay together")
        table.add_row("Tab, Up", "complete a command, earlier messages")
        table.add_row("Ctrl-C", "stop the answer, or clear what is typed")
        self._screen.print(table)

    def _stats(self, _argument: str) -> None:
        self._screen.print(stats_table(self._llm.expert_stats()))

    def _reset(self, _argument: str) -> None:
        self._conversation.turns.clear()
        self._say("the conversation is empty")

    def _budget(self, argument: str) -> None:
        if not argument:
            raise ValueError("/budget needs a size: 50%, 2GiB, a number of bytes, or auto")
        if self._llm.expert_stats().get("gpu") is None:
            self._llm.set_ram_budget(budget(argument))
        else:
            self._llm.set_vram_budget(budget(argument))
        self._say(engaged_line(self._llm))

    def _system(self, argument: str) -> None:
        if argument:
            self._conversation.system = argument
            self._say("the system prompt is set; it holds from the next message on")
        else:
            self._say(self._conversation.system or "no system prompt is set; the model's template may have its own")

    def _save(self, argument: str) -> None:
        path = save_transcript(self._conversation.messages(), argument)
        self._say(f"saved to {path}")

    def _quit(self, _argument: str) -> None:
        raise EOFError


class _SlashCompleter(Completer):
    """Completes the name of a slash command, and the space after it where it takes an argument."""

    def __init__(self, commands: Mapping[str, SlashCommand]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        for name, slash in self._commands.items():
            if typed.startswith("/") and name.startswith(typed):
                yield Completion(f"{name} " if slash.argument else name, -len(typed), display=name)


class _PrivateFileHistory(FileHistory):
    """History in a file that only its owner can read; a full disk costs the entry, not the chat."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "pyengine" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # not writable, or no home directory
        return InMemoryHistory()
    return _PrivateFileHistory(str(path))


def _key_bindings() -> KeyBindings:
    """Enter sends, Alt-Enter starts a new line, and Ctrl-D leaves only from an empty prompt."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _dropped(count: int) -> str:
    turns = "the oldest turn was" if count == 1 else f"the {count} oldest turns were"
    return f"({turns} forgotten to make room in the context; -c sets its size)"
