"""`pyengine replay`: what each cache policy would have hit on a recorded trace, with the best possible beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli.options import Command, Option

if TYPE_CHECKING:
    from rich.table import Table

    from pyengine.replay.locality import Locality
    from pyengine.replay.run import Result

_DEFAULT_TOKENS = 20000
_POLICY_HELP = "Cache policy, also learned:FILE (of `pyengine learn-policy`), with -m just learned.  [default: every]"


@click.command("replay", cls=Command, short_help="Say what cache policies and predictors would do with a trace.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", "policies", cls=Option, multiple=True, metavar="NAME", help=_POLICY_HELP)
@click.option(
    "--predictor",
    "predictors",
    cls=Option,
    multiple=True,
    metavar="NAME",
    help="What is prefetched: repeat, popularity, correlation, tokens, simulated:RECALL, scores:FILE.npy or none.",
)
@click.option(
    "--budget",
    "budgets",
    cls=Option,
    multiple=True,
    metavar="SIZE",
    help="Slots shared by all layers, as in the engine: a share, with -m also 2GiB or bytes.  [default: 50%]",
)
@click.option(
    "--slots", cls=Option, multiple=True, type=click.IntRange(min=1), metavar="N", help="Slots of each layer instead."
)
@click.option(
    "--tokens",
    cls=Option,
    type=click.IntRange(min=0),
    default=_DEFAULT_TOKENS,
    show_default=True,
    metavar="N",
    help="Tokens to replay, the last ones of the trace; 0 takes all.",
)
@click.option(
    "--distance",
    cls=Option,
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    metavar="N",
    help="Layers that predictors look ahead.",
)
@click.option(
    "--more",
    cls=Option,
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Experts named beyond those that a token uses.",
)
@click.option(
    "--least-chance",
    cls=Option,
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    metavar="P",
    help="A guess is fetched if guesses of its rank come true so often; 0 takes all.",
)
@click.option("-m", "--model", cls=Option, type=click.Path(path_type=Path), metavar="FILE", help="Takes sizes from it.")
@click.option("--bandwidth", cls=Option, type=click.FloatRange(0, min_open=True), metavar="MB/S", help="Of the disk.")
@click.option(
    "--compute",
    cls=Option,
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Time per token with nothing missing.",
)
@click.option("--expert-bytes", cls=Option, type=click.IntRange(min=1), metavar="N", help="Size of one expert.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--plot",
    cls=Option,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Also draw hit rate against slots; without several sizes given it tries many.",
)
def command(trace: Path, policies: tuple[str, ...], predictors: tuple[str, ...], **options: Any) -> None:
    """Replay a routing trace through cache policies, predictors and sizes of cache.

    TRACE is a file of `pyengine run --trace`. Belady and SCH know the future: Belady is the most that any policy can
    hit, and "gap" is how much of the way from LRU to Belady a policy goes. Predictors need times: bandwidth, compute
    and the size of an expert; what was measured with the model (-m) here is the default for them.
    """
    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner
    from pyengine.errors import UsageError
    from pyengine.policies import LEARNED, POLICIES, policy_file
    from pyengine.replay import sizes
    from pyengine.replay.locality import locality
    from pyengine.replay.plot import draw
    from pyengine.replay.run import BOUNDS, NONE, gaps_closed, judge_predictors, replay_all
    from pyengine.replay.steps import steps_of
    from pyengine.replay.timed import Prefetching
    from pyengine.traces import load_trace

    if options["budgets"] and options["slots"]:
        raise click.UsageError("--budget and --slots contradict each other.")
    doing = "Reading the trace"

    def say(what: str) -> None:
        nonlocal doing
        doing = what

    with TerminalSpinner(lambda: doing) as spinner, exit_on_interrupt(spinner.restore_terminal):
        loaded = load_trace(trace)
        if not len(loaded.ids):
            raise UsageError(f"{trace} holds no decoded tokens")
        model = options["model"]
        shape = sizes.read_fitting_shape(model, loaded.model) if model is not None else None
        wanted = [f"{LEARNED}:{policy_file(model)}" if name == LEARNED and model else name for name in policies]
        layouts = [sizes.layout_of_slots(n, loaded.model) for n in options["slots"]] or [
            sizes.layout_of_budget(b, loaded.model, shape) for b in options["budgets"] or (sizes.DEFAULT_BUDGET,)
        ]
        if options["plot"] is not None and len(layouts) == 1:
            layouts = sizes.swept(layouts, loaded.model)
        timing = sizes.timing_of(shape, options["bandwidth"], options["compute"], options["expert_bytes"])
        steps = steps_of(loaded, options["tokens"])
        results = replay_all(
            steps,
            layouts,
            wanted or (*POLICIES, *BOUNDS),
            predictors or (NONE,),
            timing,
            Prefetching(options["distance"], options["more"], options["least_chance"]),
            say,
        )
        judged = judge_predictors(steps, predictors, options["more"], say)
        say("How cacheable the model is")
        found = locality(steps)
        if options["plot"] is not None:
            draw(results, f"{loaded.model.name or trace.name}, {steps.n_token} tokens", options["plot"])
    gaps = gaps_closed(results)
    if options["as_json"]:
        answer = {
            "trace": str(trace),
            "model": vars(loaded.model),
            "tokens": steps.n_token,
            "prompts": len(steps.prompts),
            "timing": None if timing is None else vars(timing) | {"ratio": timing.ratio(steps.n_layer)},
            "locality": found.as_json(),
            "predictors": judged,
            "results": [result.as_json(gap) for result, gap in zip(results, gaps, strict=True)],
        }
        click.echo(json.dumps(answer))
    else:
        _show(results, gaps, found, judged, steps.n_token)


def _show(
    results: list[Result], gaps: list[float | None], found: Locality, judged: dict[str, list[dict[str, Any]]], n: int
) -> None:
    from rich.text import Text

    from pyengine.cli.output import DIM, console, style

    screen = console(stderr=False)
    screen.print(_table(results, gaps))
    screen.print()
    rates = ", ".join(f"{slots}: {100 * rate:.1f} %" for _, slots, rate in found.sch)
    lines = [
        ("tokens", f"{n}"),
        ("routing", f"{found.verdict}"),
        (f"SRP({found.segment})", f"{found.srp:.2f}; of random routing {found.srp_random:.2f}"),
        (f"SCH({found.segment})", f"slots per layer {rates}"),
    ]
    for name, recalls in judged.items():
        words = "; ".join(
            f"{r['distance']} ahead {100 * r['recall_at_k']:.1f} %"
            + (f" (with {r['more']} more {100 * r['recall_at_k_more']:.1f} %)" if r["more"] else "")
            for r in recalls
        )
        lines.append((name, f"recall {words}"))
    for name, text in lines:
        screen.print(Text(f"{name:>12}  ", style=style(DIM)) + Text(text))


def _table(results: list[Result], gaps: list[float | None]) -> Table:
    from rich.table import Table

    from pyengine.cli.output import DIM, style

    timed = any(r.figures.get("tokens_per_s") for r in results)
    predicted = any(r.misses is None for r in results)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style=style(DIM), pad_edge=False)
    table.add_column("\npolicy", no_wrap=True)
    if predicted:
        table.add_column("\npredictor", no_wrap=True)
    names = ["slots/\nlayer", "hit\n%", "gap\n%"]
    names += ["in time\n%", "late\n%", "wasted\n%"] if predicted else []
    names += ["stall\n%", "\ntok/s"] if timed else []
    names += ["at most\ntok/s"] if timed and not predicted else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for result, gap in zip(results, gaps, strict=True):
        f = result.figures
        moved = f.get("bytes_per_token")
        cells = [f"{result.layout.cache_shape.slots_per_layer:.3g}", _percent(result.hit_rate), _percent(gap, 0)]
        if predicted:
            wasted = f["wasted_bytes_per_token"] / moved if moved else None
            cells += [_percent(f.get("in_time")), _percent(f.get("late")), _percent(wasted)]
        if timed:
            cells += [_percent(f.get("stall_share")), _number(f.get("tokens_per_s"))]
        if timed and not predicted:
            cells.append(_number(f.get("bound_tokens_per_s")))
        table.add_row(_title(result.policy), *([result.predictor] if predicted else []), *cells)
    return table


def _title(policy: str) -> str:
    """Of a file, its name alone."""
    kind, colon, file = policy.partition(":")
    return f"{kind}{colon}{Path(file).name:.24}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
