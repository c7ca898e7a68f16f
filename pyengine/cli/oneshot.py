"""One question, one answer: what `pyengine chat` does without a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pyengine.cli.conversation import Conversation
from pyengine.cli.interrupt import StopRequest
from pyengine.cli.loading import engaged_line
from pyengine.cli.output import is_terminal, line_end, notice, reading_prompt, status_line
from pyengine.cli.wordwrap import WordWrap

if TYPE_CHECKING:
    from pyengine import Llama


def answer_once(llm: Llama, conversation: Conversation, question: str) -> None:
    """Stream the answer to standard output and what engaged and the status line to standard error.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped the answer.
    """
    notice(engaged_line(llm))
    wrap = WordWrap() if is_terminal(sys.stdout) else None
    with StopRequest(llm) as stop:
        answer = conversation.ask(question, stop)
        with reading_prompt(llm) as spinner:
            try:
                for piece in answer:
                    spinner.stop()
                    print(wrap.feed(piece) if wrap else piece, end="", flush=True)
            finally:
                print(wrap.finish() if wrap else "", end=line_end(answer.text), flush=True)
    if answer.stopped:
        raise KeyboardInterrupt
    notice(status_line(answer.figures))
