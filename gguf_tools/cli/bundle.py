"""`gguf_tools bundle`: makes, lists and removes bundles."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click

EXIT_BUSY = 3
EXIT_TERMINATED = 143  # what a shell reports for a program that SIGTERM ended


@click.command("bundle", short_help="Lay a model's experts out on disk the way they are read.")
@click.argument("models", metavar="[MODEL]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="The bundle's name.")
@click.option("--raw", is_flag=True, help="Keep matrices as they are in the model, for other CPUs.")
@click.option(
    "--order",
    "trace",
    metavar="TRACE.npz",
    type=click.Path(path_type=Path),
    help="Lay together what this routing trace uses together.",
)
@click.option("-f", "--force", is_flag=True, help="Make it anew even if it fits.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing unless something fails.")
@click.option("--low-priority", is_flag=True, help="Leave the CPU and the disk to others.")
@click.option("--list", "as_list", is_flag=True, help="List the bundles in the cache folder, and those of the models.")
@click.option("--remove", is_flag=True, help="Remove bundles: those named, or those of the models named.")
@click.option("--all", "everything", is_flag=True, help="With --remove: all in the cache folder.")
@click.pass_context
def command(
    ctx: click.Context,
    models: tuple[Path, ...],
    output: Path | None,
    raw: bool,
    trace: Path | None,
    force: bool,
    quiet: bool,
    low_priority: bool,
    as_list: bool,
    remove: bool,
    everything: bool,
) -> None:
    """Write the bundle of MODEL (of a split model give the first file): its experts once more, each in one piece and
    in the layout that this CPU's kernels want, so that pyengine gets an expert with one read and no work.

    It goes beside the model, or into the cache folder where one may not write there; pyengine finds it in either. An
    interrupted run is continued by the next. Exit code 3: another process is making this bundle.
    """
    if as_list and remove:
        raise click.UsageError("--list or --remove, not both.")
    if everything and (not remove or models):
        raise click.UsageError("--all goes with --remove and no names.")
    if as_list:
        from gguf_tools.cli.bundle_shelf import show_list

        show_list(models)
        return
    if remove:
        from gguf_tools.cli.bundle_shelf import remove_bundles

        if not models and not everything:
            raise click.UsageError("--remove needs a bundle, a model, or --all.")
        remove_bundles(models)
        return
    if len(models) != 1:
        raise click.UsageError("name one MODEL.")
    from gguf_tools.bundles.partial import BusyError

    try:
        with _terminable():
            _make(models[0], output, raw, trace, force, quiet, low_priority)
    except BusyError as error:
        click.echo(f"gguf_tools: error: {error}", err=True)
        ctx.exit(EXIT_BUSY)
    except KeyboardInterrupt as interruption:
        if sys.stderr.isatty():
            click.echo(err=True)
        click.echo("gguf_tools: interrupted; the same command goes on from here", err=True)
        ctx.exit(EXIT_TERMINATED if isinstance(interruption, _Terminated) else 130)


def _make(
    model: Path, output: Path | None, raw: bool, trace: Path | None, force: bool, quiet: bool, low_priority: bool
) -> None:
    from gguf_tools.bundles.model import opened_model, prepare, tables_of
    from gguf_tools.bundles.progress import no_progress
    from gguf_tools.bundles.shelf import fitting_bundle
    from gguf_tools.bundles.writer import make_bundle
    from gguf_tools.cli.progress import byte_progress
    from pyengine.bundles import candidates, place_for

    def say(line: str) -> None:
        if not quiet:
            click.echo(f"gguf_tools: {line}", err=True)

    prepare()
    with opened_model(model) as engine:
        tables = tables_of(engine, raw)
    target = output if output is not None else place_for(model)
    if not force:
        fitting = fitting_bundle(model, [output] if output is not None else candidates(model), say)
        if fitting is not None:
            say(f"{fitting} exists already and fits; --force makes it anew")
            return
    if trace is not None:
        from gguf_tools.bundles.order import order_by_trace

        order_by_trace(tables, trace)
    if low_priority:
        _step_back()
    started = time.monotonic()
    made = make_bundle(
        model,
        target,
        tables,
        threads=1 if low_priority else _threads(),
        progress=no_progress if quiet else byte_progress,
        say=say,
    )
    seconds = time.monotonic() - started
    written = made.file_bytes - made.bytes_kept
    if not quiet:
        click.echo(f"{target}: {made.file_bytes / 1e9:.2f} GB in {seconds:.1f} s ({written / seconds / 1e6:.0f} MB/s)")


def _threads() -> int:
    """One more than there are cores, for some wait for the disk; a disk needs no more than four."""
    return min(4, 1 + (os.cpu_count() or 1))


def _step_back() -> None:
    import psutil

    process = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError):
        process.nice(19)
    with contextlib.suppress(psutil.Error, OSError, AttributeError, ValueError):  # not every system has it
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP end the work as Ctrl-C does: nothing is lost."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
