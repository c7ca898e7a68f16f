"""`pyengine batch`: answer the prompts of a file, many at a time."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from pyengine.cli.options import Command, ModelOptions, Option, Sampling, model_and_sampling_options, n_predict_option

if TYPE_CHECKING:
    from pyengine.batch import BatchFiles, BatchSummary
    from pyengine.sessions import SamplingParams

#: LLAMA_MAX_SEQ of llama.cpp.
_MOST_SEQUENCES = 256

#: Of the shared options, those that the samplers of many sequences do not have.
_NOT_HERE = ("typical", "mirostat", "mirostat_lr", "mirostat_ent", "repeat_last_n")


@dataclass(frozen=True)
class _ManySequences(ModelOptions):
    """The model's options, for several texts at once."""

    n_sequences: int

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"n_sequences": self.n_sequences}


def _at_once(_ctx: click.Context, _option: click.Parameter, text: str) -> int | None:
    if text == "auto":
        return None
    if text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_SEQUENCES:
        return int(text)
    raise click.BadParameter(f"{text!r} is neither auto nor a number from 1 to {_MOST_SEQUENCES}")


@click.command("batch", cls=Command, short_help="Answer the prompts of a file, many at a time.")
@click.argument("prompts", metavar="PROMPTS.jsonl", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
    help="File for the answers, continued if it exists; - is standard output.",
)
@click.option(
    "-np",
    "--parallel",
    cls=Option,
    default="auto",
    show_default=True,
    callback=_at_once,
    env=True,
    metavar="N",
    help="Lines computed at once, at most; auto: as many as the context has room for, or as `plan --batch` chooses.",
)
@n_predict_option("Most tokens for lines without max_tokens; -1 until the answer ends or the context is full.")
@click.option("--overwrite", is_flag=True, help="Begin anew if FILE exists.")
@click.option("--retry-failed", is_flag=True, help="Try lines again that became error lines in FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on standard output.")
@model_and_sampling_options
def command(
    model_options: ModelOptions,
    sampling: Sampling,
    prompts: Path,
    output: Path,
    parallel: int | None,
    n_predict: int,
    overwrite: bool,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Answer every line of PROMPTS.jsonl; - is standard input.

    Lines are those of OpenAI's Batch API ({"custom_id", "method", "url", "body"}, for /v1/chat/completions and
    /v1/completions), or only {"messages": ...} or {"prompt": ...}, whose custom_id is their line number. The options
    below hold for what a line leaves open, and --ctx-size is shared by all lines that are computed at once.

    Answers are written as they are finished, in that order, and named by custom_id. A line that cannot be answered
    becomes an error line. After a crash or Ctrl-C the same command goes on where it ended: every line is answered once.
    """
    stdin, stdout = str(prompts) == "-", str(output) == "-"
    if overwrite and retry_failed:
        raise click.UsageError("--overwrite leaves nothing for --retry-failed.")
    if stdout and as_json:
        raise click.UsageError("--json needs the standard output that -o - takes.")
    if n_predict == 0:
        raise click.UsageError("-n/--n-predict must be at least 1, or -1.")
    _refuse_samplers_of_one_text()
    options = _ManySequences(**vars(model_options), n_sequences=_sequences(model_options, parallel))

    from pyengine.batch import open_batch

    source: Path | BinaryIO = sys.stdin.buffer if stdin else prompts
    target: Path | BinaryIO = sys.stdout.buffer if stdout else output
    with open_batch(source, target, overwrite=overwrite, retry_failed=retry_failed) as files:
        summary = _answered(files, options, parallel, _sampling_params(sampling, n_predict))
        _tell(summary, as_json)
    if summary.interrupted:
        from pyengine.cli.output import notice

        kept = f"what is finished is in {output}"
        notice(f"stopped; {kept}" + ("" if stdin or stdout else ", and the same command goes on from there"))
        raise KeyboardInterrupt


def _sequences(options: ModelOptions, parallel: int | None) -> int:
    """For how many texts to open the model: a call into llama.cpp has a token of each.

    Raises:
        click.UsageError: -b leaves no room for --parallel.
    """
    from pyengine.batch.grouping import MOST_AT_ONCE

    most = min(options.batch_size or _MOST_SEQUENCES, _MOST_SEQUENCES)
    if parallel is not None and parallel > most:
        raise click.UsageError(f"-np/--parallel {parallel} needs a -b/--batch-size of at least {parallel}.")
    # As many again for beginnings that are kept.
    return min(2 * (parallel or MOST_AT_ONCE), most)


def _refuse_samplers_of_one_text() -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in _NOT_HERE and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} is not for batches.")


def _sampling_params(sampling: Sampling, n_predict: int) -> SamplingParams:
    from pyengine.sessions import SamplingParams

    return SamplingParams(
        max_tokens=n_predict if n_predict > 0 else None,
        temperature=sampling.temp,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.resolved_seed(),
    )


def _answered(
    files: BatchFiles, options: _ManySequences, parallel: int | None, sampling: SamplingParams
) -> BatchSummary:
    """Load the model, unless there is nothing to do, and answer."""
    from pyengine.batch import BatchSummary, answer_files
    from pyengine.cli.batch_progress import shown_progress
    from pyengine.cli.interrupt import StopRequest
    from pyengine.cli.loading import opened
    from pyengine.cli.output import notice

    if files.complete:
        files.begin()
        return BatchSummary(lines=files.total, resumed=files.resumed)
    with opened(options) as (llm, _):
        notice(llm.engaged)
        with StopRequest(llm) as stop, shown_progress() as show:

            def progress(summary: BatchSummary) -> None:
                show(summary)
                stop.tick()

            return answer_files(
                llm,
                files,
                parallel=parallel,
                sampling=sampling,
                progress=progress,
                stop=lambda: stop.requested,
                waiting=stop.waiting,
            )


def _tell(summary: BatchSummary, as_json: bool) -> None:
    from pyengine.cli.batch_progress import summary_lines
    from pyengine.cli.output import notice

    if as_json:
        click.echo(json.dumps(summary.as_json()))
        return
    for line in summary_lines(summary):
        notice(line)


for _parameter in command.params:
    if _parameter.name in _NOT_HERE and isinstance(_parameter, click.Option):
        _parameter.hidden = True
