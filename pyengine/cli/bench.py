"""`pyengine bench`: measure stock llama.cpp and pyengine in turns, and write every sample, plots and a report."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli.experiments import asked_experiment, experiment_options, run_and_tell
from pyengine.cli.options import Option
from pyengine.cli.timeline import refuse_own_options, run_timeline, timeline_options

if TYPE_CHECKING:
    from pyengine.bench.settings import Settings


def _numbers(_ctx: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas, perhaps with % signs."""
    if text is None:
        return None
    try:
        return tuple(float(part.strip().removesuffix("%")) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 25,50,100") from None


_option = functools.partial(click.option, cls=Option)
_POSITIVE = click.IntRange(min=1)


@click.command("bench", short_help="Measure speed against stock llama.cpp.")
@_option(
    "-m",
    "--model",
    "models",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="GGUF model file; may be given several times.  [default: the bundled model, with quick settings]",
)
@_option(
    "--widened",
    type=_POSITIVE,
    multiple=True,
    metavar="N",
    help="The bundled model with N neurons per expert, made in the cache folder if absent; may be repeated.",
)
@_option("--rows", metavar="A,B,...", help="Rows to measure.  [default: all; --rows help lists them]")
@_option("--budgets", callback=_numbers, metavar="P,...", help="Budgets in percent.  [default: 12.5,25,50,75,100]")
@_option("--tokens", type=click.IntRange(min=2), metavar="N", help="Tokens after each prompt.  [default: 48]")
@_option("--prompts", type=click.IntRange(1, 4), metavar="N", help="Prompts to decode after.  [default: 3]")
@_option("--prompt-tokens", type=_POSITIVE, metavar="N", help="Tokens of a prefill.  [default: 512]")
@_option("--rounds", type=_POSITIVE, metavar="N", help="Samples of each row.  [default: 3]")
@_option("--seconds", type=click.FloatRange(min=1), metavar="S", help="Most seconds per prompt.  [default: 60]")
@_option("-t", "--threads", type=_POSITIVE, metavar="N", help="Threads of the kernels.  [default: physical cores]")
@_option("--disk-limit", metavar="SIZE", help="Most bytes read per second, e.g. 200M (as root, by control group).")
@_option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take expert ids from a routing trace (.npz) and not from the router: for models with random weights.",
)
@_option("--check-plan", is_flag=True, help="Also predict each row right before it, as pyengine plan does.")
@_option(
    "--recall",
    type=click.FloatRange(0, 1),
    metavar="R",
    help="With --trace: guesses, two layers ahead, that are right so often.",
)
@_option("--gpu", metavar="NAME", help="Measure on a GPU such as CUDA0; budgets are of its memory, the rest is in RAM.")
@_option("--make-bundles", is_flag=True, help="Make bundles that are missing, for the lru-bundle rows.")
@_option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("pyengine-bench"),
    show_default=True,
    metavar="DIR",
    help="Folder for bench.csv, machine.json and plots.",
)
@_option("--report", type=click.Path(path_type=Path), metavar="FILE", help="Also write the report page, Markdown.")
@_option("--no-plots", is_flag=True, help="Draw no plots; matplotlib is not needed then.")
@_option("--json", "as_json", is_flag=True, help="Print a summary as JSON on standard output.")
@_option("--force", is_flag=True, help="Measure although the machine is busy.")
@timeline_options
@experiment_options
def command(**options: Any) -> None:
    """Measure load, prefill and decode of stock llama.cpp and of pyengine at several budgets, in turns.

    Each sample is a fresh process with an empty page cache in a memory control group, so this is best run as root and
    with nothing else running. Every sample goes into bench.csv as it comes.
    """
    if options["rows"] == "help":
        from pyengine.bench.rows import ALL_KINDS, KINDS, ROW_SETS

        for kind, what in ALL_KINDS.items():
            click.echo(f"{kind:20} {what}{'' if kind in KINDS else ' (if asked for)'}")
        for name, kinds in ROW_SETS.items():
            click.echo(f"{name:20} {', '.join(kinds)}")
        return
    if options["timeline"] is not None:
        run_timeline(options)
        return
    refuse_own_options(options)
    experiment = asked_experiment(options)
    from pyengine.bench.run import Order, run_benchmark
    from pyengine.bench.summary import faults, in_order, noise, summarise
    from pyengine.bundled import bundled_model
    from pyengine.cli.output import console, notice

    quick = not options["models"] and not options["widened"]
    order = Order(
        models=[bundled_model()] if quick else options["models"],
        widened=options["widened"],
        settings=_settings(options, quick),
        make_bundles=options["make_bundles"] or quick,
        out=options["out"],
        report=options["report"],
        plots=not options["no_plots"],
        force=options["force"],
        command=_command_line(sys.argv[1:]),
    )
    if experiment is not None:
        run_and_tell(order, experiment, notice)
        notice(f"results in {order.out}")
        return
    run = run_benchmark(order, notice)
    rows = in_order(summarise(run.samples))
    wrong = faults(rows)
    if options["as_json"]:
        found = {
            **run.record,
            "noise": vars(noise(run.samples)),
            "rows": [row.as_json() for row in rows],
            "faults": wrong,
        }
        click.echo(json.dumps(found, indent=1))
    else:
        from pyengine.bench.terminal_table import speed_tables

        for table in speed_tables(rows):
            console(stderr=False).print(table)
        notice(f"noise: {noise(run.samples).sentence()}")
    notice(f"results in {order.out}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _settings(options: dict[str, Any], quick: bool) -> Settings:
    """What was asked for, else the settings for a quick run of the bundled model, else the defaults."""
    from pyengine.bench.rows import GPU, KINDS, expand
    from pyengine.bench.run import bytes_per_second
    from pyengine.bench.settings import QUICK, Settings
    from pyengine.llama import default_threads

    usual = tuple(GPU if options["gpu"] else KINDS)
    asked = {
        "gpu": options["gpu"],
        "kinds": expand([part.strip() for part in options["rows"].split(",")]) if options["rows"] else usual,
        "shares": options["budgets"],
        "n_tokens": options["tokens"],
        "n_prompts": options["prompts"],
        "prefill_tokens": options["prompt_tokens"],
        "rounds": options["rounds"],
        "decode_limit_s": options["seconds"],
        "n_threads": options["threads"] or default_threads(),
        "disk_limit": bytes_per_second(options["disk_limit"]) if options["disk_limit"] else None,
        "trace": options["trace"],
        "check_plan": options["check_plan"],
        "recall": options["recall"],
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return Settings(**{**(QUICK if quick else {}), **given})


def _command_line(arguments: list[str]) -> str:
    """The command as typed, without folders: it goes into results that are published."""
    shown = [Path(part).name if "/" in part and not part.startswith("-") else part for part in arguments]
    return "pyengine " + shlex.join(shown)
