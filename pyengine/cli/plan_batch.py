"""The part of `pyengine plan` about many texts at once: how many hide reading, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pyengine.cli.output import DIM, ERROR, STRONG, console, format_bytes, style
from pyengine.planner.inequalities import AHEAD, ALL, FIRST

if TYPE_CHECKING:
    from pathlib import Path

    from pyengine.budget import Budget
    from pyengine.planner.kept_costs import LastRun
    from pyengine.planner.solving import BatchPlan, Candidate, Work
    from pyengine.planning.shape import ModelShape

#: The inequalities as they are written in pyengine/planner/inequalities.py.
_FORMS = {AHEAD: ("A + G", "K T"), FIRST: ("hot", "T0 + T"), ALL: ("hot + (Q-1) E", "T0 + Q T")}


def show_batch(plan: BatchPlan, limit: int, how_measured: str, run: LastRun | None) -> None:
    """Print a batch plan on standard output.

    Args:
        limit: bytes of memory it is for.
        run: what the last batch was like, if one is known.
    """
    screen = console(stderr=False)
    work, chosen = plan.work, plan.chosen
    where = f" of {plan.costs.device}" if plan.costs.device else ""
    title = f"Texts of {work.prompt_tokens} + {work.answer_tokens} tokens in {format_bytes(limit)} of memory{where}"
    screen.print()
    screen.print(Text(title, style=style(STRONG)))
    screen.print()
    screen.print(_numbers(plan))
    screen.print()
    screen.print(_inequalities(chosen))
    costs = plan.costs
    screen.print(
        Text(
            f"of a layer, in a step of {chosen.n_sequences}; T {_ms(costs.pace_s)} per expert{_link(plan)}, T0 "
            f"{_ms(costs.latency_s)}, E {_ms(float(costs.expert_s(1.0)))} with one row",
            style=style(DIM),
        )
    )
    screen.print()
    for name, text in (
        ("n", _choice(plan)),
        ("memory", f"{format_bytes(chosen.ram_budget)} of slots, {chosen.kv_tokens} KV cells for all texts"),
        ("prompts", f"{chosen.prompt_chunk} tokens in a step that decodes: {_ms(chosen.prompt_step.total)}"),
        ("predicted", f"{_ms(chosen.step.total)} a step, {chosen.tokens_per_s:.3g} tok/s of answers"),
        ("actual", _actual(run)),
        ("routing", plan.routing),
        ("costs", how_measured),
    ):
        screen.print(Text(f"{name:>12}  ", style=style(DIM)) + Text(text))


def planned_on_gpu(
    shape: ModelShape,
    gpu: str,
    work: Work,
    vram_limit: int | None,
    ram_budget: Budget,
    trace: Path | None,
    again: bool,
    no_probe: bool,
) -> tuple[BatchPlan, int, str, LastRun | None]:
    """What show_batch() takes, for slots in the memory of a GPU. Raises PyengineError if nothing can be planned."""
    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner
    from pyengine.planner.batch_on_gpu import plan_on_gpu
    from pyengine.planner.batch_plan import last_run

    doing = "Planning"

    def say(text: str) -> None:
        nonlocal doing
        doing = text

    with TerminalSpinner(lambda: doing) as spinner, exit_on_interrupt(spinner.restore_terminal):
        plan, limit, place, how = plan_on_gpu(
            shape,
            gpu,
            work,
            vram_limit=vram_limit,
            ram_budget=ram_budget,
            trace=trace,
            again=again,
            may_measure=not no_probe,
            say=say,
        )
    return plan, limit, how, last_run(shape, place)


def batch_json(plan: BatchPlan, limit: int, how_measured: str, run: LastRun | None) -> dict[str, Any]:
    """The same as plain data; times in seconds, sizes in bytes."""
    return {
        "prompt_tokens": plan.work.prompt_tokens,
        "answer_tokens": plan.work.answer_tokens,
        "memory_limit": limit,
        "n_sequences": plan.n_sequences,
        "n_hidden": plan.n_hidden,
        "prompt_chunk": plan.chosen.prompt_chunk,
        "kv_tokens": plan.chosen.kv_tokens,
        "ram_budget": plan.chosen.ram_budget,
        "binding": plan.chosen.binding.name,
        "tried": [_candidate(one) for one in plan.tried],
        "costs": asdict(plan.costs),
        "routing": plan.routing,
        "how": how_measured,
        "last_run": None if run is None else asdict(run),
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "n_sequences": one.n_sequences,
        "slots": one.slots,
        "missing": one.missing,
        "wanted": one.wanted,
        "step": asdict(one.step),
        "prompt_step": asdict(one.prompt_step),
        "tokens_per_s": one.tokens_per_s,
        "hidden": one.hidden,
        "inequalities": [asdict(each) | {"holds": each.holds} for each in one.inequalities],
    }


def _numbers(plan: BatchPlan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)
    for name in ("n", "slots/\nlayer", "missing/\nlayer", "step", "of that\nwaiting", "tok/s", "reading\nhidden"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in plan.tried:
        hidden = Text("yes") if one.hidden else Text(f"no: {one.binding.name}", style=style(ERROR))
        table.add_row(
            f"{one.n_sequences}",
            f"{one.slots / plan.n_layer:.3g}",
            f"{one.missing:.1f} of {one.wanted:.1f}",
            _ms(one.step.total),
            _ms(one.step.waiting),
            f"{one.tokens_per_s:.3g}",
            hidden,
            style=style(STRONG) if one is plan.chosen else "",
        )
    return table


def _inequalities(one: Candidate) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    for each in one.inequalities:
        left, right = _FORMS[each.name]
        sign = Text(">=") if each.holds else Text("< ", style=style(ERROR))
        words = Text(each.words, style=style(DIM))
        table.add_row(each.name, left, _ms(each.computing), sign, _ms(each.reading), right, words)
    return table


def _choice(plan: BatchPlan) -> str:
    n, hidden = plan.n_sequences, plan.n_hidden
    if hidden is None:
        most = plan.tried[-1].n_sequences
        return f"{n}: up to {most} texts, the most that fit or were tried, do not hide reading; more give little"
    if hidden == n:
        return f"{n}, the smallest that hides reading"
    if hidden > n:
        return f"{n}: {hidden} hide reading, and give little more" if not plan.chosen.hidden else f"{n}"
    return f"{n}: {hidden} hide reading, more rows to an expert still pay"


def _actual(run: LastRun | None) -> str:
    if run is None:
        return "no batch was run yet with these costs"
    return (
        f"last run, {run.n_sequences} texts at once: {_ms(run.actual_step_s)} a step, planned "
        f"{_ms(run.planned_step_s)} ({100 * run.error:+.0f} %)"
    )


def _link(plan: BatchPlan) -> str:
    """How fast experts come over the link, if they do, and from where."""
    costs = plan.costs
    if not costs.device or costs.transfer_s <= 0:
        return ""
    words = f" ({costs.transfer_bytes / costs.transfer_s / 1e9:.3g} GB/s over the link"
    return words + (f", {costs.ram_share:.0%} of them in RAM)" if costs.ram_share < 1 else ")")


def _ms(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"
