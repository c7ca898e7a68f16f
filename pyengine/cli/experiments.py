"""`pyengine bench --never-slower` and `--papers`: contests, in as many sittings as they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pyengine.cli.options import Option

if TYPE_CHECKING:
    from pyengine.bench.experiments import Experiment
    from pyengine.bench.results import Run
    from pyengine.bench.run import Order

Function = TypeVar("Function", bound=Callable[..., Any])

#: Terms of --never-slower that are not contest.Terms' own: three models, two budgets and four disks in half an hour.
_BRIEF = {"rounds": 3, "turn_s": 2.5, "warm_s": 4.0}

_OWN = ("disks", "ratios", "minutes")
_BARE = "none"

_OPTIONS = (
    click.option(
        "--never-slower",
        cls=Option,
        is_flag=True,
        help="Measure no rows; let auto and the baselines take turns at each budget and disk, warm.",
    ),
    click.option(
        "--papers",
        cls=Option,
        is_flag=True,
        help="Likewise against the papers' systems, for several R = expert transfer time / layer compute time.",
    ),
    click.option(
        "--disks",
        cls=Option,
        metavar="SIZE,...",
        help="With --never-slower: disk limits.  [default: none,500M,200M,50M]",
    ),
    click.option("--ratios", cls=Option, metavar="R,...", help="With --papers: values of R.  [default: 0.7,1,2,4,8]"),
    click.option(
        "--minutes",
        cls=Option,
        type=click.FloatRange(min=0, min_open=True),
        metavar="M",
        help="With either: begin no further round after M minutes; the same command again goes on, until each cell has "
        "its --rounds.",
    ),
)


def experiment_options(command: Function) -> Function:
    """Give the benchmark's command the options of experiments."""
    decorated: Callable[..., Any] = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]


def asked_experiment(options: dict[str, Any]) -> Experiment | None:
    """The experiment that is asked for, if one is. Raises UsageError for options that contradict each other."""
    if options["never_slower"] and options["papers"]:
        raise click.UsageError("--never-slower and --papers are two experiments; give one.")
    if not options["never_slower"] and not options["papers"]:
        for name in _OWN:
            if options[name] is not None:
                raise click.UsageError(f"--{name} goes with --never-slower or --papers.")
        return None
    from pyengine.bench.contest import Terms
    from pyengine.bench.experiments import NEVER_SLOWER, PAPERS, Experiment
    from pyengine.bench.run import bytes_per_second

    for name in ("rows", "prompts", "prompt_tokens", "disk_limit", "check_plan"):
        if options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --never-slower and --papers.")
    if options["ratios" if options["never_slower"] else "disks"] is not None:
        raise click.UsageError("--disks goes with --never-slower, --ratios with --papers.")
    asked: dict[str, Any] = {"minutes": options["minutes"]}
    if options["disks"] is not None:
        parts = [part.strip() for part in options["disks"].split(",")]
        asked["disks"] = tuple(None if part == _BARE else bytes_per_second(part) for part in parts)
    if options["ratios"] is not None:
        asked["ratios"] = _ratios(options["ratios"])
    known: dict[str, Any] = dict(_BRIEF) if options["never_slower"] else {}
    terms: dict[str, Any] = {"rounds": options["rounds"], "turn_s": options["seconds"], "most_steps": options["tokens"]}
    return Experiment(
        NEVER_SLOWER if options["never_slower"] else PAPERS,
        Terms(
            **(known | {name: value for name, value in terms.items() if value is not None}),
            all_contend=options["papers"],
        ),
        **asked,
    )


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or min(ratios) <= 0:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,2,4", param_hint="--ratios")
    return ratios


def run_and_tell(order: Order, experiment: Experiment, say: Callable[[str], None]) -> Run:
    """Play, and print the table.

    Raises:
        RuntimeError: some turn of pyengine's gave other tokens.
        and what experiments.run_experiment() raises.
    """
    from pyengine.bench.experiments import run_experiment
    from pyengine.bench.report_contests import contests
    from pyengine.bench.verdicts import verdicts

    run = run_experiment(order, experiment, say)
    click.echo("\n".join(contests(run)))
    wrong = [verdict.cell for verdict in verdicts(run.samples) if not verdict.exact]
    if wrong:
        raise RuntimeError(f"other tokens in {', '.join(f'{cell.model} {cell.share:g}%' for cell in wrong)}")
    return run
