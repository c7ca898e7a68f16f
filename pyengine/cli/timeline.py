"""`pyengine bench --timeline`: a few decoded tokens as a picture and as a file for trace viewers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from pyengine.cli.options import Option

if TYPE_CHECKING:
    from pyengine import Llama
    from pyengine.timeline.recording import Recording
    from pyengine.timeline.summary import Summary

Function = TypeVar("Function", bound=Callable[..., Any])

_OWN = ("ram_budget", "policy", "look_ahead", "bundle")
#: Options of the benchmark that mean the same here.
_SHARED = ("timeline", "models", "widened", "tokens", "threads", "trace", "recall", "as_json")

#: Tokens decoded before: slots fill, and the prefetcher learns what its guesses are worth, and whether
#: looking ahead pays (advice/trial.py).
_WARM_UP = 96
_TOKENS = 9
_PICTURES = (".png", ".svg", ".pdf")

_OPTIONS = (
    click.option(
        "--timeline",
        cls=Option,
        type=click.Path(path_type=Path),
        metavar="OUT",
        help="Measure no rows; record a few tokens and write OUT.png (one of them drawn) and OUT.json (for "
        "ui.perfetto.dev).",
    ),
    click.option(
        "--ram-budget", cls=Option, metavar="SIZE", help="With --timeline: memory for experts.  [default: 50%]"
    ),
    click.option(
        "--policy", cls=Option, metavar="NAME", help="With --timeline: as of `pyengine run`.  [default: auto]"
    ),
    click.option("--look-ahead", cls=Option, metavar="WAY", help="With --timeline: likewise.  [default: auto]"),
    click.option("--bundle", cls=Option, metavar="WHICH", help="With --timeline: likewise.  [default: use]"),
)


def timeline_options(command: Function) -> Function:
    """Give the benchmark's command the options of a timeline."""
    decorated: Callable[..., Any] = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]


def refuse_own_options(options: dict[str, Any]) -> None:
    """Raise UsageError if an option is given that only a timeline has."""
    for name in _OWN:
        if options[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --timeline; rows have budgets of their own.")


def run_timeline(options: dict[str, Any]) -> None:
    """Record, write both files, say where they are and what they show.

    Raises:
        click.UsageError: options that contradict each other.
        PyengineError, OSError, ValueError: see pyengine.Llama; a file that cannot be written.
    """
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        name = str(parameter.name)
        given = ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        if given and name not in _OWN + _SHARED:
            raise click.UsageError(f"{parameter.opts[-1]} does not go with --timeline.")
    if len(options["models"]) + len(options["widened"]) > 1:
        raise click.UsageError("--timeline takes one model.")
    picture, trace = output_files(options["timeline"])
    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner, notice
    from pyengine.timeline.chrome import chrome_trace
    from pyengine.timeline.plot import draw, load_matplotlib
    from pyengine.timeline.summary import summarise

    load_matplotlib()  # before minutes of work
    doing = "Loading the model"

    def say(what: str) -> None:
        nonlocal doing
        doing = what

    with TerminalSpinner(lambda: doing) as spinner, exit_on_interrupt(spinner.restore_terminal):
        recording, about = _recorded(options, say)
        summary = summarise(recording)
        say("Drawing")
        draw(recording.timeline.typical(), _title(about, summary), picture)
        with trace.open("w", encoding="utf-8") as file:
            json.dump(chrome_trace(recording.timeline, about), file)
    if options["as_json"]:
        click.echo(json.dumps({**about, **vars(summary), "tokens_per_s": summary.tokens_per_s}))
    else:
        click.echo(summary.sentence())
    notice(f"{picture}: one token; {trace}: all {summary.tokens} tokens, for ui.perfetto.dev")


def output_files(out: Path) -> tuple[Path, Path]:
    """The picture's path and the trace's; `out` may end as either does.

    Raises:
        OSError: they cannot be written.
    """
    ending = out.suffix.lower()
    stem = out.with_suffix("") if ending in (*_PICTURES, ".json") else out
    paths = tuple(stem.with_name(stem.name + end) for end in (ending if ending in _PICTURES else ".png", ".json"))
    for path in paths:
        if not path.parent.is_dir():
            raise FileNotFoundError(2, "there is no such folder", str(path.parent))
        if path.is_dir():
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(13, os.strerror(13), str(path))
    return paths[0], paths[1]


def _recorded(options: dict[str, Any], say: Callable[[str], None]) -> tuple[Recording, dict[str, Any]]:
    from pyengine import Llama
    from pyengine.bench.child import REPLAY_DISTANCE, LoadedModel
    from pyengine.bench.model_facts import read_facts
    from pyengine.bench.replay_trace import TraceTexts
    from pyengine.bench.texts import short_prompts
    from pyengine.bench.widened import widened_model
    from pyengine.bundled import bundled_model
    from pyengine.cli.options import budget
    from pyengine.errors import UsageError
    from pyengine.timeline.recording import record

    n_token = options["tokens"] or _TOKENS
    path = options["models"][0] if options["models"] else bundled_model()
    if options["widened"]:
        path = widened_model(options["widened"][0], say)
    replay = None
    if options["trace"] is not None:
        replay = TraceTexts(options["trace"], 1)
        replay.check(read_facts(path))
    llm = Llama(
        path,
        ram_budget=budget(options["ram_budget"] or "50%"),
        policy=options["policy"] or "auto",
        look_ahead=options["look_ahead"] or "auto",
        bundle=options["bundle"] or "use",
        n_threads=options["threads"],
        n_threads_batch=options["threads"],
        n_ctx=256 * (1 + (64 + _WARM_UP + n_token) // 256),
    )
    try:
        if llm.engine is None:
            raise UsageError(f"--timeline: {llm.engaged}")
        native = llm.engine.native
        if replay is not None and options["recall"] is not None:
            native.set_prefetch_rules(replay_recall=options["recall"], replay_distance=REPLAY_DISTANCE)
        if replay is None:
            prompt = llm.tokenize(short_prompts()[0].encode())
        else:
            prompt = list(replay.texts(1, llm.n_vocab()).prompts[0])
        say("Decoding")
        recording = record(LoadedModel(llm, replay), native, prompt, _WARM_UP, n_token)
        return recording, _about(llm, path, options["trace"])
    finally:
        llm.close()


def _about(llm: Llama, path: Path, trace: Path | None) -> dict[str, Any]:
    """What was run; without folders: it goes into files that are published."""
    assert llm.engine is not None
    stats = llm.expert_stats()
    return {
        "model": path.name,
        "slots": stats["slots"],
        "experts": stats["experts"],
        "policy": llm.engine.policy,
        "look_ahead": llm.engine.foresight,
        "bundle": stats["bundle"] is not None,
        "threads": llm.n_threads,
        "trace": trace.name if trace is not None else None,
    }


def _title(about: dict[str, Any], summary: Summary) -> str:
    advice = f"policy {about['policy']}, look-ahead {about['look_ahead']}"
    share = 100 * about["slots"] / about["experts"]
    routing = f", routing of {about['trace']}" if about["trace"] else ""
    return (
        f"One token of {about['model'].removesuffix('.gguf')}{routing}, {share:.3g} % of its "
        f"experts in RAM, {advice}: {summary.tokens_per_s:.3g} tokens/s"
    )
