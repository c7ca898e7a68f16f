"""`pyengine run`: complete one prompt, as text or as JSON with token ids, timings and expert statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import inputs
from pyengine.cli.options import Command, ModelOptions, Sampling, model_and_sampling_options, n_predict_option

if TYPE_CHECKING:
    from pyengine import Llama


@click.command("run", cls=Command, short_help="Complete a prompt.")
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from FILE; - is standard input.")
@n_predict_option("Tokens to generate; -1 until the text ends or the context is full.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option(
    "--trace",
    metavar="FILE",
    help="Write which experts were used to FILE, for `pyengine plan`; auto keeps it in the cache folder.",
)
@click.option("--trace-inputs", is_flag=True, help="Keep the gate inputs too, for `pyengine learn-predictor`; large.")
@model_and_sampling_options
def command(
    model_options: ModelOptions,
    sampling: Sampling,
    prompt: str | None,
    file: str | None,
    n_predict: int,
    as_json: bool,
    trace: str | None,
    trace_inputs: bool,
) -> None:
    """Complete a prompt as it stands, without a chat template.

    The text that follows the prompt goes to standard output as it is made; it ends where the model ends it. With
    --json one object follows at the end instead, with the keys text, token_ids, finish_reason, seed, timings,
    expert_stats and engaged. Times are in seconds: prompt_s lasts to the first token, decode_s from the first token to
    the last, so that decode_tokens_per_s is (generated_tokens - 1) / decode_s.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt with either -p TEXT or -f FILE.")
    if trace_inputs and trace is None:
        raise click.UsageError("--trace-inputs needs --trace FILE.")
    text = inputs.from_option(prompt, "--prompt") if prompt is not None else inputs.from_file(str(file))

    from pyengine.cli.completion import complete
    from pyengine.cli.loading import engaged_line, opened
    from pyengine.cli.output import notice, status_line

    trace_path = _writable_trace(model_options.model, trace) if trace is not None else None
    with opened(model_options) as (llm, load_s):
        engaged = engaged_line(llm)
        notice(engaged)
        write_trace = _recording(llm, trace_path, trace_inputs) if trace_path is not None else None
        result = complete(llm, text, n_predict, sampling, stream=not as_json)
        if write_trace is not None:
            write_trace(result.stopped)
        if result.stopped:
            raise KeyboardInterrupt
        if as_json:
            timings: dict[str, Any] = {"load_s": load_s, **result.timings()}
            timings |= {"n_threads": llm.n_threads, "n_threads_batch": llm.n_threads_batch}
            report = {
                "text": result.text,
                "token_ids": result.token_ids,
                "finish_reason": result.finish_reason,
                "seed": result.seed,
                "timings": timings,
                "expert_stats": llm.expert_stats(),
                "engaged": engaged,
            }
            click.echo(json.dumps(report, default=float))
        else:
            notice(status_line(result.figures(llm)))


def _writable_trace(model: Path | None, name: str) -> Path:
    """Where the trace goes, before anything is computed. Raises OSError if it cannot be written."""
    from pyengine import bundled_model
    from pyengine.planning.plan import default_trace
    from pyengine.whole_file import check_writable

    path = default_trace(Path(model or bundled_model())) if name == "auto" else Path(name)
    check_writable(path)
    return path


def _recording(llm: Llama, path: Path, inputs: bool) -> Callable[[bool], None]:
    """Record the model's routing from now on; call what this returns to write it, with whether Ctrl-C ended the run.

    Raises:
        UsageError: the model has no experts that could be recorded.
    """
    from pyengine.errors import UsageError
    from pyengine.traces import TraceError, save_trace
    from pyengine.traces.recorder import TraceRecorder

    if llm.engine is None:
        raise UsageError("--trace: this model runs without managed experts, so there is no routing to record")
    recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, Path(llm.model_path), inputs=inputs)

    def write(stopped: bool) -> None:
        try:
            save_trace(path, recorder.trace())
        except TraceError:  # nothing was computed
            if not stopped:
                raise

    return write
