"""`pyengine learn-predictor`: learn from a trace which experts come next, and say how well that works."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyengine.cli.options import Command, Option
from pyengine.cli.traced_model import traced_model, traced_model_options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pyengine.predictors.learn import Learned
    from pyengine.predictors.samples import Samples
    from pyengine.traces import Trace

_option = functools.partial(click.option, cls=Option)
_FORMS = ("auto", "fate", "fate-corrected", "linear", "mlp")


def _distances(_ctx: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part[:9]) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of distances such as 1,2")
    return tuple(int(part[:9]) for part in parts)


@click.command("learn-predictor", cls=Command, short_help="Learn from a trace which experts come next.")
@traced_model_options
@_option(
    "--distance",
    "distances",
    default="1,2",
    show_default=True,
    callback=_distances,
    metavar="N,...",
    help="Layers from the gate input to the layer whose experts are predicted.",
)
@_option(
    "--form",
    type=click.Choice(_FORMS),
    default="auto",
    show_default=True,
    help="The form of predictor; auto takes the best one for each layer, or none where that does not pay.",
)
@_option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File for the predictors.  [default: the model's own in the cache folder]",
)
@_option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help="Draw recall by layer.")
@_option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    trace: Path,
    model: Path | None,
    distances: tuple[int, ...],
    form: str,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Learn from TRACE, a routing trace with gate inputs, which experts later layers will need.

    Nine tenths of the trace's sequences are learned from; every figure is measured on the rest. The miss columns count
    only experts that an LRU cache of half the experts does not hold: what a prefetcher can gain.
    """
    path = traced_model(model)

    from pyengine.cli.output import notice
    from pyengine.planning.shape import read_shape
    from pyengine.predictors import PredictorSet, predictors_file, save_predictors
    from pyengine.predictors.learn import FORMS, learn
    from pyengine.predictors.routers import read_routers
    from pyengine.predictors.samples import make_samples
    from pyengine.traces import load_trace

    info = read_shape(path).info
    recorded = load_trace(trace)
    _check_model(recorded, path, (info.n_layer, info.n_expert, info.n_expert_used))
    samples = make_samples(recorded)
    routers = read_routers(path, info.n_layer)
    with _progress() as progress:
        learned = learn(samples, routers, distances, FORMS if form == "auto" else (form,), progress)
    file = predictors_file(path) if output is None else output
    save_predictors(file, PredictorSet(recorded.model, learned.predictors))
    if as_json:
        click.echo(json.dumps(_as_json(samples, learned) | {"file": str(file)}))
    else:
        _show(samples, learned)
    if plot is not None:
        from pyengine.predictors.plots import draw_recall

        draw_recall(plot, learned.layers, path.name)
    notice(f"{len(learned.predictors)} predictors in {file}")


def _check_model(trace: Trace, path: Path, shape: tuple[int, int, int]) -> None:
    """Raise PredictorError unless the trace can be of this model, or of a widened copy, which routes alike."""
    from pyengine.predictors import PredictorError

    recorded = trace.model
    if (recorded.n_layer, recorded.n_expert, recorded.n_expert_used) != shape:
        raise PredictorError(
            f"the trace is of a model with {recorded.n_layer} layers of {recorded.n_expert} experts, "
            f"{recorded.n_expert_used} per token; {path.name} has {shape[0]} of {shape[1]}, {shape[2]} per token"
        )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal; the function takes (done, total)."""
    import sys

    from pyengine.cli.output import console, is_terminal

    if not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("Learning"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _as_json(samples: Samples, learned: Learned) -> dict[str, object]:
    from dataclasses import asdict

    from pyengine.predictors.figures import means

    part = samples.split
    return {
        "model": asdict(samples.trace.model),
        "tokens": {"fit": len(part.fit), "choose": len(part.choose), "held_out": len(part.held_out)},
        "by_sequence": part.by_sequence,
        "layers": [asdict(report) for report in learned.layers],
        "means": {str(distance): values for distance, values in means(learned.layers).items()},
        "multiply_adds": sum(p.multiply_adds for p in learned.predictors),
    }


def _show(samples: Samples, learned: Learned) -> None:
    """Print on standard output: for each distance the recall of every layer, the form chosen, and the means."""
    from rich.text import Text

    from pyengine.cli.output import DIM, console, style
    from pyengine.predictors.figures import means

    screen = console(stderr=False)
    part = samples.split
    how = "whole sequences" if part.by_sequence else "the last ones, of too few sequences"
    text = (
        f"tokens: {len(part.fit)} to learn from, {len(part.choose)} to choose by, {len(part.held_out)} held out ({how})"
    )
    screen.print(Text(text, style=style(DIM)))
    screen.print(
        Text(f"k = {samples.k}; percent of the experts used; missing: of those not resident", style=style(DIM))
    )
    for distance, forms in sorted(means(learned.layers).items(), key=lambda item: (item[0] <= 0, abs(item[0]))):
        screen.print()
        if distance <= 0:
            screen.print(_heading("router on its own input" if distance == 0 else "without gate inputs"))
        else:
            screen.print(_heading(f"{distance} layer{'' if distance == 1 else 's'} ahead: recall@k by layer"))
            screen.print(_layers(learned, distance))
            screen.print()
        screen.print(_means(samples, learned, distance, forms))


def _heading(text: str) -> Text:
    from rich.text import Text

    from pyengine.cli.output import STRONG, style

    return Text(text, style=style(STRONG))


def _table() -> Table:
    from rich.table import Table

    from pyengine.cli.output import DIM, style

    return Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)


def _layers(learned: Learned, distance: int) -> Table:
    reports = [r for r in learned.layers if r.distance == distance]
    forms = list(dict.fromkeys(form for r in reports for form in r.figures))
    table = _table()
    table.add_column("layer", justify="right")
    for form in forms:
        table.add_column(form.replace("-", "-\n"), justify="right", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    table.add_column("why: recall of the missing")
    for report in reports:
        cells = [_percent(report.figures.get(form, {}).get("recall@k")) for form in forms]
        choice = report.choice
        chosen = ("none" if choice.form is None else choice.form) if choice is not None else ""
        table.add_row(str(report.target), *cells, chosen, choice.why if choice is not None else "")
    return table


def _means(samples: Samples, learned: Learned, distance: int, forms: dict[str, dict[str, float]]) -> Table:
    from pyengine.predictors.recall import BEYOND

    table = _table()
    table.add_column("mean")
    names = [("recall", m) for m in BEYOND] + [("miss_recall", m) for m in BEYOND]
    for kind, m in names:
        head = "miss" if kind == "miss_recall" else ""
        table.add_column(f"{head}\n@k+{m}" if m else f"{head}\n@k", justify="right", no_wrap=True)
    table.add_column("exact\nset", justify="right")
    # No more than all experts can be named.
    n_layer = sum(r.distance == distance for r in learned.layers)
    possible = samples.trace.model.n_expert - samples.k
    for form, figures in forms.items():
        # A form that was not tried everywhere has another mean.
        tried = sum(form in r.figures for r in learned.layers if r.distance == distance)
        name = f"{form} ({tried} layers)" if 0 < tried < n_layer else form
        cells = [_percent(figures.get(f"{k}@k+{m}" if m else f"{k}@k")) if m <= possible else "-" for k, m in names]
        table.add_row(name, *cells, _percent(figures.get("exact")))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
