"""`pyengine doctor`: what could make it slow or fail on this machine, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyengine.cli.options import Command, Option

if TYPE_CHECKING:
    from rich.table import Table

    from pyengine.diagnosis.finding import Finding
    from pyengine.diagnosis.patient import Patient

_COLOURS = {"ok": "green", "note": "cyan", "slow": "yellow", "fail": "red"}


@click.command("doctor", cls=Command, short_help="Find what could make it slow or fail here.")
@click.option(
    "-m",
    "--model",
    cls=Option,
    type=click.Path(path_type=Path),
    env=True,
    metavar="FILE",
    help="GGUF model file to examine with its disk.  [default: the bundled model]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.pass_context
def command(ctx: click.Context, model: Path | None, as_json: bool) -> None:
    """Examine this machine, what is installed and a model: one line per check, and what to do where something is wrong.

    The exit code is 1 if something would fail, 0 otherwise.
    """
    from pyengine.cli.output import TerminalSpinner
    from pyengine.diagnosis.checks import examine

    findings: dict[str, Finding] = {}
    with TerminalSpinner("Examining"):
        findings.update(examine(_patient(model)))
    if as_json:
        click.echo(json.dumps({name: finding.as_json() for name, finding in findings.items()}))
    else:
        _show(findings)
    if any(finding.level.value == "fail" for finding in findings.values()):
        ctx.exit(1)


def _patient(model: Path | None) -> Patient:
    from pyengine import startup
    from pyengine.bundled import bundled_model
    from pyengine.diagnosis.patient import Patient
    from pyengine.errors import PyengineError

    path = bundled_model() if model is None else model
    try:
        startup.check()
        from pyengine.planning.shape import read_shape

        return Patient(path, read_shape(path))
    except (PyengineError, RuntimeError, OSError):
        return Patient(path)  # the checks say why


def _show(findings: dict[str, Finding]) -> None:
    from pyengine.cli.output import DIM, console, style

    console(stderr=False).print(_lines(findings))
    counts = {level: sum(f.level.value == level for f in findings.values()) for level in ("fail", "slow")}
    if any(counts.values()):
        words = [f"{n} would {level}" if level == "fail" else f"{n} would be slow" for level, n in counts.items() if n]
        console(stderr=False).print("\n" + ", ".join(words), style=style(DIM))


def _lines(findings: dict[str, Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from pyengine.cli.output import DIM, style

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in findings.items():
        level = finding.level.value
        text = Text(finding.found)
        if finding.remedy:
            text.append("\n-> " + finding.remedy, style=style(DIM))
        table.add_row(Text(level, style=style(_COLOURS[level])), name, text)
    return table
