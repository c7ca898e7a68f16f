"""How a plan looks in a terminal of 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from pyengine.cli.output import DIM, ERROR, STRONG, console, format_bytes, style
from pyengine.planning.plan import PROMPT

if TYPE_CHECKING:
    from pyengine.planning.plan import BudgetLine, Plan


def show(plan: Plan, how_measured: str) -> None:
    """Print the plan on standard output; `how_measured` says where its speeds come from."""
    screen = console(stderr=False)
    info = plan.shape.info
    screen.print(Text(plan.shape.path.name, style=style(STRONG)))
    screen.print(
        f"{info.architecture}, {info.n_layer} layers of {info.n_expert} experts, {info.n_expert_used} per token"
    )
    screen.print()
    screen.print(_budgets(plan))
    if plan.lines[0].prediction is not None:
        about = f"prefill, first token: {PROMPT} tokens of prompt, warm and cold; read: per token"
        screen.print(Text(about, style=style(DIM)))
    screen.print()
    screen.print(_contexts(plan))
    screen.print()
    for name, text in (
        ("weights", f"{format_bytes(info.expert_bytes)} of experts, {format_bytes(plan.shape.other_bytes)} of others"),
        ("least budget", f"{format_bytes(info.least_budget)} of slots"),
        ("memory", f"{format_bytes(plan.available_bytes)} available; auto leaves {format_bytes(plan.reserve_bytes)}"),
        ("routing", plan.routing),
        ("speeds", how_measured),
    ):
        screen.print(Text(f"{name:>12}  ", style=style(DIM)) + Text(text))


def _budgets(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)
    with_speeds = plan.lines[0].prediction is not None
    names = ["experts\nin RAM", "slots'\nbytes", "slots/\nlayer", "memory\nin all", "it\nfits", "hit\nrate"]
    if with_speeds:
        names += ["decode\ntok/s", "prefill\ntok/s", "first\ntoken", "read\nMiB"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for line in plan.lines:
        fits = Text("yes") if line.fits else Text("no", style=style(ERROR))
        cells = _cells(line)
        table.add_row(*cells[:4], fits, *cells[4:])
    return table


def _cells(line: BudgetLine) -> list[str]:
    cells = [
        line.name,
        format_bytes(line.budget_bytes),
        f"{line.slots_per_layer:.3g}",
        format_bytes(line.total_bytes),
        f"{100 * line.hit_rate:.0f} %",
    ]
    if line.prediction is not None:
        p = line.prediction
        cells += [
            _figure(p.decode_tokens_per_s),
            _figure(p.prefill_tokens_per_s[PROMPT]),
            f"{_figure(p.first_token_s)} s",
            _figure(p.bytes_per_token / 2**20),
        ]
    return cells


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _contexts(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)
    table.add_column("context", justify="right")
    table.add_column("KV cache", justify="right")
    table.add_column("")
    for n, size, fits in plan.contexts:
        words = "the model's own" if n == plan.shape.n_ctx_train else ""
        note = (
            Text(words, style=style(DIM)) if fits else Text("does not fit beside the least budget", style=style(ERROR))
        )
        table.add_row(f"{n} tokens", format_bytes(size), note)
    if 0 < plan.largest_context < max(n for n, _, _ in plan.contexts):
        note = Text("the largest that fits beside the least budget", style=style(DIM))
        largest = plan.largest_context
        table.add_row(f"{largest} tokens", format_bytes(largest * plan.shape.kv_bytes_per_token), note)
    return table


def show_unmanaged(path: Path, reason: str, as_json: bool) -> None:
    """Say that stock llama.cpp runs this model alone, and what it needs at least."""
    from pyengine.budget import available_memory

    size, available = path.stat().st_size, available_memory()
    if as_json:
        found = {"model": str(path), "managed": False, "reason": reason}
        click.echo(json.dumps(found | {"file_bytes": size, "available_bytes": available}))
        return
    fits = "fits in" if size < available else "is more than"
    click.echo(f"{path.name}: {reason}; stock llama.cpp runs it, nothing is planned")
    click.echo(f"its file of {format_bytes(size)} {fits} the {format_bytes(available)} of memory available")
