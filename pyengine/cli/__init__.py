"""The `pyengine` command: a table of commands, each imported only when it is used.

Importing this module must stay cheap (`pyengine --help` answers in a fraction of a second), so nothing here or at the
top of a command's module imports llama_cpp, numpy, rich or prompt_toolkit.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
import warnings
from typing import Any

import click

# Command name -> module that defines it as `command`.
COMMANDS: dict[str, str] = {
    "chat": "pyengine.cli.chat",
    "run": "pyengine.cli.run",
    "batch": "pyengine.cli.batch",
    "plan": "pyengine.cli.plan",
    "replay": "pyengine.cli.replay",
    "doctor": "pyengine.cli.doctor",
    "bench": "pyengine.cli.bench",
    "learn-predictor": "pyengine.cli.learn_predictor",
    "learn-policy": "pyengine.cli.learn_policy",
}

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended


class CommandTable(click.Group):
    """A group that finds its commands in COMMANDS and turns expected failures into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the shell's prompt starts on a line of its own
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            message = failure_message(error)
            if message is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"pyengine: error: {message}", err=True)
            ctx.exit(EXIT_FAILURE)


def failure_message(error: Exception) -> str | None:
    """One line for a failure the user can act on; None for what is a bug of ours or click's own affair."""
    from pyengine.errors import PyengineError

    if isinstance(error, OSError) and not isinstance(error, PyengineError):
        if error.errno == errno.EPIPE:
            return None  # the reader of our output went away: click ends quietly
        if error.strerror:
            where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, (str, os.PathLike)) else ""
            return f"{where}{error.strerror}"
    if isinstance(error, (PyengineError, ValueError, RuntimeError, OSError)):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return "out of memory"
    return None


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    click.echo(f"pyengine {installed_version('pyengine')} (llama-cpp-python {installed_version('llama-cpp-python')})")
    ctx.exit()


def installed_version(distribution: str) -> str:
    """The installed version of a distribution, or "(not installed)" when running from a source tree."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _plain_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"pyengine: warning: {' '.join(str(message).split())}", err=True)


@click.command(
    cls=CommandTable,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="'pyengine COMMAND --help' lists a command's options. Without -m the bundled model is used.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@click.option("--debug", is_flag=True, hidden=True, envvar="PYENGINE_DEBUG", help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Run mixture-of-experts GGUF models that are bigger than memory."""
    # A character the terminal's encoding lacks must not end an answer.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not debug:
        warnings.showwarning = _plain_warning
