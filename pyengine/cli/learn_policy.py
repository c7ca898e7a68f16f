"""`pyengine learn-policy`: learn from a trace which experts are worth keeping, and keep that if it proves good."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from pyengine.cli.options import Command, Option
from pyengine.cli.traced_model import traced_model, traced_model_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from pyengine.replay.layout import Layout
    from pyengine.replay.run import Result
    from pyengine.traces import Trace

_option = functools.partial(click.option, cls=Option)
#: Sizes of cache that are measured unless others are named.
_BUDGETS = ("25%", "50%", "75%")
#: Of the tokens, the part that is learned from; and how far from it whole sequences may end.
_LEARNED_FROM, _AT_LEAST, _AT_MOST = 0.9, 0.8, 0.95


@click.command("learn-policy", cls=Command, short_help="Learn from a trace which experts are worth keeping.")
@traced_model_options
@_option(
    "--slots",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure with so many slots in each layer, instead of room for 25, 50 and 75 % of all experts.",
)
@_option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File for what is learned; needs no model.  [default: the model's own in the cache folder]",
)
@_option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(trace: Path, model: Path | None, slots: tuple[int, ...], output: Path | None, as_json: bool) -> None:
    """Learn from TRACE, a routing trace of some ten thousand tokens, which experts are worth keeping in memory.

    The first nine tenths of the trace's sequences are learned from, some minutes on one core; every figure is measured
    on the rest. What was learned is kept only if it misses fewer experts there than LFU: then `--policy learned` uses
    it, and `--policy auto` where it proves better.
    """
    from pyengine.cli.output import TerminalSpinner, notice
    from pyengine.policies import policy_file
    from pyengine.policies.kept import save_policy
    from pyengine.policies.learning import FEWEST
    from pyengine.replay import sizes
    from pyengine.replay.run import gaps_closed
    from pyengine.traces import load_trace

    recorded = load_trace(trace)
    file = output
    if model is not None or output is None:
        path = traced_model(model)
        recorded = _of_model(recorded, path)
        file = output or policy_file(path)
    assert file is not None
    divided = _divide(recorded)
    _check_length(divided.n_learn, len(recorded.ids), FEWEST, trace)
    layouts = [sizes.layout_of_slots(n, recorded.model) for n in slots] or [
        sizes.layout_of_budget(budget, recorded.model, None) for budget in _BUDGETS
    ]
    doing = "Learning"

    def say(what: str) -> None:
        nonlocal doing
        doing = what

    results: list[Result] = []
    with TerminalSpinner(lambda: doing):
        learned = _learn(divided.to_learn, layouts[0], lambda share: say(f"Learning, {100 * share:.0f} %"))
        if learned:
            results = _measure(recorded, len(recorded.ids) - divided.n_learn, layouts, learned, say)
    worse = _where_not_better(results)
    good = bool(learned) and not worse
    if good:
        save_policy(file, recorded.model, learned)
    gaps = gaps_closed(results)
    if as_json:
        answer = {
            "trace": str(trace),
            "model": vars(recorded.model),
            "tokens": {"learned_from": divided.n_learn, "held_out": len(recorded.ids) - divided.n_learn},
            "by_sequence": divided.by_sequence,
            "results": [result.as_json(gap) for result, gap in zip(results, gaps, strict=True)],
            "kept": str(file) if good else None,
        }
        click.echo(json.dumps(answer))
    elif results:
        _show(results, gaps, divided, len(recorded.ids))
    if good:
        notice(f"Kept in {file}")
    elif learned:
        notice(f"It does not beat LFU with {', '.join(worse)} slots per layer: nothing is kept")
    else:
        notice("Nothing was learned that frequencies of use do not tell as well: nothing is kept")


class _Divided(NamedTuple):
    to_learn: Trace
    n_learn: int
    """tokens; the others measure"""
    by_sequence: bool
    """False: no sequence ends near nine tenths, so one is cut"""


def _of_model(trace: Trace, path: Path) -> Trace:
    """The trace; one that names no model has now as many experts as this one. Raises UsageError unless it fits."""
    from dataclasses import replace

    from pyengine.replay.sizes import read_fitting_shape

    shape = read_fitting_shape(path, trace.model)
    return replace(trace, model=replace(trace.model, n_expert=shape.info.n_expert))


def _check_length(n_learn: int, n_token: int, fewest: int, path: Path) -> None:
    from pyengine.policies.learned import LearnedPolicyError

    if n_learn < fewest:
        raise LearnedPolicyError(
            f"{path} has {n_token} decoded tokens; {round(fewest / _LEARNED_FROM):,} is the least that teaches a "
            "policy what is true of other texts"
        )


def _divide(trace: Trace) -> _Divided:
    """The first nine tenths: later texts measure what was learned from earlier ones, as later use does."""
    import numpy as np

    from pyengine.traces import Trace

    n = len(trace.ids)
    ends = trace.starts[(trace.starts >= _AT_LEAST * n) & (trace.starts <= _AT_MOST * n)]
    wanted = round(_LEARNED_FROM * n)
    n_learn = int(ends[np.abs(ends - wanted).argmin()]) if len(ends) else wanted
    part = Trace(trace.model, trace.ids[:n_learn], trace.starts[trace.starts < n_learn])
    return _Divided(part, n_learn, bool(len(ends)))


def _learn(trace: Trace, layout: Layout, say: Callable[[float], None]) -> Mapping[str, Any]:
    """What a file would hold; empty if nothing was learned."""
    from pyengine.policies.learned import LearnedPolicy
    from pyengine.policies.learning import fit

    policy = LearnedPolicy(layout.cache_shape)
    fit(policy, trace, say=say)
    return policy.save()


def _measure(
    trace: Trace, n_token: int, layouts: list[Layout], learned: Mapping[str, Any], say: Callable[[str], None]
) -> list[Result]:
    """LRU, LFU, what was learned, and Belady, at each size, over the last tokens; slots are empty at first."""
    from pyengine.policies import LEARNED, make_policy
    from pyengine.policies.learned import LearnedPolicy
    from pyengine.replay.bounds import belady
    from pyengine.replay.hits import replay_policy
    from pyengine.replay.run import BELADY, LRU, NONE, Result
    from pyengine.replay.steps import steps_of

    steps = steps_of(trace, n_token)
    results = []
    for layout in layouts:
        for name in (LRU, "lfu", LEARNED, BELADY):
            say(f"Measuring {name}, {layout.total} slots")
            if name == BELADY:
                misses = belady(steps, layout)
            elif name == LEARNED:
                misses = replay_policy(steps, layout, LearnedPolicy(layout.cache_shape, learned))
            else:
                misses = replay_policy(steps, layout, make_policy(name, layout.cache_shape))
            results.append(Result(name, NONE, layout, misses))
    return results


def _where_not_better(results: list[Result]) -> list[str]:
    """Slots per layer with which what was learned misses as many experts as LFU, or more."""
    rates = {(r.layout.total, r.policy): r.hit_rate for r in results}
    return [
        f"{r.layout.cache_shape.slots_per_layer:.3g}"
        for r in results
        if r.policy == "learned" and rates[r.layout.total, "learned"] <= rates[r.layout.total, "lfu"] < 1
    ]


def _show(results: list[Result], gaps: list[float | None], divided: _Divided, n_token: int) -> None:
    from rich.text import Text

    from pyengine.cli.output import DIM, console, style

    screen = console(stderr=False)
    how = "whole sequences" if divided.by_sequence else "the last ones, within a sequence"
    text = f"tokens: {divided.n_learn} to learn from, {n_token - divided.n_learn} held out ({how})"
    screen.print(Text(text, style=style(DIM)))
    screen.print(_table(results, gaps))


def _table(results: list[Result], gaps: list[float | None]) -> Table:
    from rich.table import Table

    from pyengine.cli.output import DIM, style

    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)
    table.add_column("slots/\nlayer", justify="right")
    table.add_column("\npolicy", no_wrap=True)
    table.add_column("hit\n%", justify="right")
    table.add_column("gap\n%", justify="right")
    for result, gap in zip(results, gaps, strict=True):
        closed = "" if gap is None else f"{100 * gap:.0f}"
        size = f"{result.layout.cache_shape.slots_per_layer:.3g}"
        table.add_row(size, result.policy, f"{100 * result.hit_rate:.1f}", closed)
    return table
