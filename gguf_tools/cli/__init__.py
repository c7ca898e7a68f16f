"""The `gguf_tools` command: a table of commands, each imported only when it is used.

Importing this module must stay cheap, so nothing here or at the top of a command's module imports gguf, numpy or rich.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
from typing import Any

import click

# Command name -> module that defines it as `command`.
COMMANDS: dict[str, str] = {
    "inspect": "gguf_tools.cli.inspect",
    "synthesize": "gguf_tools.cli.synthesize",
    "widen": "gguf_tools.cli.widen",
    "bundle": "gguf_tools.cli.bundle",
    "verify": "gguf_tools.cli.verify",
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
            click.echo(f"gguf_tools: error: {message}", err=True)
            ctx.exit(EXIT_FAILURE)


def failure_message(error: Exception) -> str | None:
    """One line for a failure the user can act on; None for what is a bug of ours or click's own affair."""
    from gguf_tools.errors import GgufToolsError, one_line

    if isinstance(error, GgufToolsError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno != errno.EPIPE:  # click ends quietly when our reader went away
        where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, (str, os.PathLike)) else ""
        return one_line(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return "out of memory"
    return None


@click.command(
    cls=CommandTable,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="'gguf_tools COMMAND --help' lists a command's options.",
)
@click.option("--debug", is_flag=True, hidden=True, envvar="GGUF_TOOLS_DEBUG", help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Look into GGUF models with experts, and make others from them."""
    # A character the terminal's encoding lacks must not end a table.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
