"""`gguf_tools inspect`: what is in a model and how large it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gguf_tools.inspect_model import Experts, Summary

_PIPE_WIDTH = 160  # columns where there is no terminal to ask


@click.command("inspect", short_help="Show what is in a model.")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes in bytes.")
def command(model: Path, as_json: bool) -> None:
    """Show the sizes of MODEL by class of tensor, and the number, shapes and sizes of its experts.

    Reads metadata only. MODEL may be the first file of a split model.
    """
    from gguf_tools.inspect_model import inspect_model

    summary = inspect_model(model)
    if as_json:
        click.echo(json.dumps(summary.as_json(), ensure_ascii=False, indent=2))
        return
    _show(summary)


def _show(summary: Summary) -> None:
    from rich.console import Console

    from gguf_tools.cli.output import format_bytes

    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    name = f" · {summary.name}" if summary.name else ""
    parts = f" in {summary.files} files" if summary.files > 1 else ""
    console.print(f"{Path(summary.path).name} · {summary.architecture}{name}", style=_style("bold"))
    console.print(f"{format_bytes(summary.file_bytes)}{parts}, {summary.tensors} tensors")
    console.print()
    console.print(_class_table(summary))
    console.print()
    if summary.experts is None:
        console.print("No experts: a dense model.")
    else:
        _show_experts(console, summary, summary.experts)


def _style(name: str) -> str:
    return "" if os.environ.get("NO_COLOR") else name


def _table(*columns: str, right: frozenset[str] = frozenset()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style=_style("bold"))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _class_table(summary: Summary) -> Table:
    from gguf_tools.cli.output import format_bytes

    table = _table("class", "tensors", "size", "share", "types", right=frozenset(("tensors", "size", "share")))
    total = max(1, summary.tensor_bytes)
    for c in summary.classes:
        share = f"{100 * c.bytes / total:.1f} %"
        table.add_row(c.name, str(c.tensors), format_bytes(c.bytes), share, ", ".join(c.types))
    table.add_section()
    table.add_row("total", str(summary.tensors), format_bytes(summary.tensor_bytes), "100 %", "")
    return table


def _show_experts(console: Console, summary: Summary, experts: Experts) -> None:
    from rich.table import Table

    from gguf_tools.cli.output import format_bytes, format_ranges

    def one_or_range(values: tuple[int, ...], form: Callable[[int], str] = str) -> str:
        ends = dict.fromkeys((form(min(values)), form(max(values))))
        return " to ".join(ends)

    used = f"{experts.used} used" if experts.used else "number used unknown"
    facts = Table.grid(padding=(0, 3))
    facts.add_column(style=_style("dim"))
    facts.add_column()
    facts.add_row("experts", f"{experts.per_block} in a layer, {used}; {experts.total} together")
    facts.add_row("layers with experts", f"{len(experts.blocks)} ({format_ranges(experts.blocks)})")
    facts.add_row("neurons of an expert", one_or_range(experts.n_ff))
    facts.add_row("bytes per expert", one_or_range(experts.bytes_per_expert, format_bytes))
    rest = format_bytes(summary.other_bytes_per_token)
    facts.add_row("bytes per token", f"{format_bytes(experts.bytes_per_token)} of experts, {rest} of the rest")
    facts.add_row("slots for all experts", format_bytes(experts.slot_bytes))
    console.print(facts)
    console.print()
    table = _table("shape class", "matrices of an expert", "expert", "slot", right=frozenset(("expert", "slot")))
    for c in experts.shape_classes:
        matrices = ", ".join(f"{m.projection} {m.n_in}x{m.n_out} {m.type}" for m in c.matrices)
        table.add_row(f"layers {format_ranges(c.blocks)}", matrices, format_bytes(c.bytes), format_bytes(c.slot_bytes))
    console.print(table)
