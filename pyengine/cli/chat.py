"""`pyengine chat`: a conversation in the terminal, or one answer where there is no terminal."""

from __future__ import annotations

import sys

import click

from pyengine.cli import inputs
from pyengine.cli.options import Command, ModelOptions, Sampling, model_and_sampling_options, n_predict_option

#: Tokens of an answer that nobody watches, unless -n says otherwise: a small model may go round in circles.
MOST_UNATTENDED = 1024
DEFAULT_QUESTION = "Hello! Who are you, and what can you help me with?"


@click.command("chat", cls=Command, short_help="Talk with a model.")
@click.option("-p", "--prompt", metavar="TEXT", help="Answer TEXT once and exit; - reads it from standard input.")
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt.")
@n_predict_option("Most tokens in an answer; -1 until it ends or the context is full.")
@model_and_sampling_options
def command(
    model_options: ModelOptions, sampling: Sampling, prompt: str | None, system: str | None, n_predict: int
) -> None:
    """Talk with a model in the terminal.

    Answers stream as they are made; Ctrl-C stops one and keeps the conversation, /help lists the commands.

    With --prompt, or where standard input or output is no terminal, one question is answered and the program ends: the
    answer alone goes to standard output. The question is --prompt, else what is piped in, else a greeting.
    """
    from pyengine.cli.conversation import Conversation
    from pyengine.cli.loading import opened
    from pyengine.cli.output import is_terminal

    if n_predict == 0:
        raise click.UsageError("-n 0 would leave nothing of an answer.")
    if system is not None:
        system = inputs.from_option(system, "--system-prompt")
    question = _question(prompt)
    if question is None and not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        question = inputs.from_pipe() or DEFAULT_QUESTION
    with opened(model_options) as (llm, _):
        if question is not None and n_predict < 0:
            n_predict = MOST_UNATTENDED
        conversation = Conversation(llm, sampling, max_tokens=n_predict, system=system)
        if question is not None:
            from pyengine.cli.oneshot import answer_once

            answer_once(llm, conversation, question)
        else:
            from pyengine.cli.session import Session

            Session(llm, conversation).run()


def _question(prompt: str | None) -> str | None:
    """The question --prompt asks; an empty one counts as not given."""
    if prompt == "-":
        return inputs.from_file("-").strip() or None
    return inputs.from_option(prompt, "--prompt") or None if prompt is not None else None
