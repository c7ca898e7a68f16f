"""`pyengine plan`: what each budget holds and how fast it will run, before the model is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pyengine.cli.options import CONTEXT_STEP, DEFAULT_CONTEXT, Command, Option, budget

if TYPE_CHECKING:
    from pyengine.planner.kept_costs import LastRun
    from pyengine.planner.solving import BatchPlan, Work
    from pyengine.planning.measured import Measured
    from pyengine.planning.shape import ModelShape

#: Runnable processes per core before a probe, from which it suffers.
_BUSY = 0.5


@click.command("plan", cls=Command, short_help="Say what fits, and how fast it will run.")
@click.option(
    "-m",
    "--model",
    cls=Option,
    type=click.Path(path_type=Path),
    env=True,
    metavar="FILE",
    help="GGUF model file (the first one of a split model).  [default: the bundled model]",
)
@click.option(
    "--ram-budget",
    cls=Option,
    default="auto",
    show_default=True,
    env=True,
    metavar="SIZE",
    help="A budget to show besides the usual ones: 50%, 2GiB, bytes, or auto. With a GPU: of the RAM behind it.",
)
@click.option(
    "--gpu",
    cls=Option,
    default="auto",
    show_default=True,
    env=True,
    metavar="auto|off|NAME",
    help="Where experts compute: auto takes a GPU that llama.cpp was built for, NAME one such as CUDA0.",
)
@click.option(
    "--vram-budget",
    cls=Option,
    default="auto",
    show_default=True,
    env=True,
    metavar="SIZE",
    help="With a GPU: a budget of its memory to show besides the usual ones, as --ram-budget; SIZE,SIZE,... are added.",
)
@click.option(
    "-c",
    "--ctx-size",
    cls=Option,
    type=click.IntRange(min=0),
    default=DEFAULT_CONTEXT,
    show_default=True,
    env=True,
    metavar="N",
    help="Context to make room for, tokens; 0 takes the model's own.",
)
@click.option(
    "--trace",
    cls=Option,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Routing trace to plan with (`pyengine run --trace` makes one).  [default: the one recorded last]",
)
@click.option("--probe", "again", is_flag=True, help="Measure this machine again, though it was measured before.")
@click.option("--no-probe", is_flag=True, help="Measure nothing; speeds only if this machine was measured before.")
@click.option("--batch", is_flag=True, help="Also say how many texts to compute at once.")
@click.option(
    "--ram-limit",
    cls=Option,
    metavar="SIZE",
    help="With --batch: memory for everything, 2GiB or bytes.  [default: what is available]",
)
@click.option(
    "--vram-limit",
    cls=Option,
    metavar="SIZE",
    help="With --batch and a GPU: its memory for everything, 2GiB or bytes.  [default: what is free]",
)
@click.option(
    "--prompt-tokens",
    cls=Option,
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    metavar="N",
    help="With --batch: tokens of a usual prompt.",
)
@click.option(
    "--answer-tokens",
    cls=Option,
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="With --batch: tokens of a usual answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    model: Path | None,
    ram_budget: str,
    gpu: str,
    vram_budget: str,
    ctx_size: int,
    trace: Path | None,
    again: bool,
    no_probe: bool,
    batch: bool,
    ram_limit: str | None,
    vram_limit: str | None,
    prompt_tokens: int,
    answer_tokens: int,
    as_json: bool,
) -> None:
    """Say what each expert budget holds and how fast it will run on this machine.

    The first time, the model is run for some seconds to measure kernels and disk; the result is kept. Speeds follow
    from it and from the model's routing: from a trace if there is one, otherwise every expert counts as equally likely.
    "Prefill" is for a prompt of 512 tokens while the model is in use, "first token" for the first such prompt after
    loading. Memory includes the other weights and the KV cache.

    With a GPU: what lies in VRAM, in RAM and on disk, how often each has what a token needs, and the time of a token by
    what takes it: computing, moving from RAM, reading the disk.

    --batch shows when computing several texts at once hides reading experts, by inequalities of the times of one layer:
    A attention, G router, hot and E experts that are there and one that comes, Q of which come, T the time to read one.
    """
    if again and no_probe:
        raise click.UsageError("--probe and --no-probe contradict each other.")
    limits = {"--ram-limit": ram_limit, "--vram-limit": vram_limit}
    for option, limit in limits.items():
        if limit is not None and not batch:
            raise click.UsageError(f"{option} needs --batch.")
    for name in ("prompt_tokens", "answer_tokens"):
        source = click.get_current_context().get_parameter_source(name)
        if source is ParameterSource.COMMANDLINE and not batch:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --batch.")

    from pyengine import bundled_model, startup
    from pyengine.cli.plan_gpu import device_for, gpu_json, gpu_plan, show_gpu
    from pyengine.errors import UnmanagedModelError

    startup.check()
    from pyengine.architectures import MANAGED
    from pyengine.budget import available_memory, check_wording, reserve
    from pyengine.cli.plan_tables import show, show_unmanaged
    from pyengine.planning.plan import budgets_to_show, find_routing, make_plan
    from pyengine.planning.shape import read_shape

    wanted = budget(ram_budget)
    check_wording(wanted)
    device, wanted_vram = device_for(gpu, budget(vram_budget))
    if device is None and vram_limit is not None:
        raise click.UsageError("--vram-limit needs a GPU, and there is none in use.")
    if device is not None and ram_limit is not None:
        raise click.UsageError("--ram-limit needs --gpu off; with a GPU, --ram-budget is the memory for experts.")
    given = {option: _memory(limit, option) for option, limit in limits.items() if limit is not None}
    path = Path(bundled_model()) if model is None else model
    try:
        shape = read_shape(path)
        if shape.info.architecture not in MANAGED:
            raise UnmanagedModelError(f"architecture {shape.info.architecture!r} is not managed (yet)")
    except UnmanagedModelError as reason:
        show_unmanaged(path, str(reason), as_json)
        return
    routing, words = find_routing(shape, trace)
    n_ctx = -(-ctx_size // CONTEXT_STEP) * CONTEXT_STEP
    if device is not None:
        found = gpu_plan(shape, device, wanted_vram, wanted, n_ctx, (routing, words), again, no_probe)
        batch_part = None
        if batch:
            from pyengine.cli.plan_batch import planned_on_gpu
            from pyengine.planner.solving import Work

            work, most = Work(prompt_tokens, answer_tokens), given.get("--vram-limit")
            batch_part = planned_on_gpu(shape, gpu, work, most, wanted, trace, again, no_probe)
        _report(gpu_json(*found) if as_json else None, lambda: show_gpu(*found), batch_part)
        return
    measured, how = _measured(shape, again, no_probe)
    plan = make_plan(shape, budgets_to_show(shape, wanted), n_ctx, routing, words, measured)
    batch_part = None
    if batch:
        from pyengine.planner.solving import Work

        work = Work(prompt_tokens, answer_tokens)
        room = given.get("--ram-limit", available_memory() - reserve())
        batch_part = _batch(shape, work, room, trace, measured, again, no_probe)
    report = plan.as_json() | {"probe": how, "measured": _plain(measured)} if as_json else None
    _report(report, lambda: show(plan, how), batch_part)


def _report(
    as_json: dict[str, Any] | None,
    show_tables: Callable[[], None],
    batch_part: tuple[BatchPlan, int, str, LastRun | None] | None,
) -> None:
    """One JSON object, or the tables if there is none; with the plan of a batch behind."""
    from pyengine.cli.plan_batch import batch_json, show_batch

    if as_json is not None:
        click.echo(json.dumps(as_json | ({"batch": batch_json(*batch_part)} if batch_part else {})))
        return
    show_tables()
    if batch_part is not None:
        show_batch(*batch_part)


def _memory(limit: str, option: str) -> int:
    """Bytes. Raises BudgetError."""
    from pyengine.budget import resolve
    from pyengine.errors import BudgetError

    size = budget(limit)
    if size == "auto" or (isinstance(size, str) and "%" in size):
        raise BudgetError(f"{option} {limit!r} is not understood; write 2GiB or bytes")
    return resolve(size, slot_bytes=sys.maxsize, least=0, name=option)


def _batch(
    shape: ModelShape,
    work: Work,
    limit: int,
    trace: Path | None,
    measured: Measured | None,
    again: bool,
    no_probe: bool,
) -> tuple[BatchPlan, int, str, LastRun | None]:
    """What show_batch() takes. Raises PyengineError if nothing can be planned."""
    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner
    from pyengine.errors import UsageError
    from pyengine.planner.batch_plan import known_costs, last_run, plan_batch, save_measured
    from pyengine.planner.measuring import estimated_costs, measure_costs

    costs = None if again else known_costs(shape)
    how = "measured earlier, or learned from runs; --probe measures again"
    if costs is None or not costs.measured:
        if measured is None:
            raise UsageError(
                "how many texts to compute at once is not known without speeds; measure without --no-probe"
            )
        costs, how = estimated_costs(shape, measured), "estimated from the speeds above"
        if not no_probe:
            with TerminalSpinner("Measuring many texts") as spinner, exit_on_interrupt(spinner.restore_terminal):
                costs, how = measure_costs(shape, measured), "measured now"
            save_measured(shape, costs)
    plan = plan_batch(
        shape,
        ram_limit=limit,
        prompt_tokens=work.prompt_tokens,
        answer_tokens=work.answer_tokens,
        costs=costs,
        trace=trace,
    )
    return plan, limit, how, last_run(shape)


def _measured(shape: ModelShape, again: bool, no_probe: bool) -> tuple[Measured | None, str]:
    """What is known of this machine's speed with this model, and a few words on where it comes from."""
    import psutil
    from llama_cpp._logger import set_verbose

    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner
    from pyengine.planning import measured as kept
    from pyengine.planning import probe

    set_verbose(False)  # checking a bundle makes ggml talk
    bundle = probe.now_used_bundle(shape.path)
    key = kept.machine_key(shape.path, bundle)
    file = kept.probe_file(shape.path)
    if not again:
        found = kept.load(file, key)
        if found is not None:
            return found, "measured earlier; --probe measures again"
    if no_probe:
        return None, "no speeds: this machine was not measured with this model"
    doing = "Loading"
    load = psutil.getloadavg()[0] / (os.cpu_count() or 1)

    def say(text: str) -> None:
        nonlocal doing
        doing = text

    try:
        with TerminalSpinner(lambda: doing) as spinner, exit_on_interrupt(spinner.restore_terminal):
            found = probe.measure(shape, say)
    except probe.ProbeError as reason:
        return None, f"no speeds: {reason}"
    how = f"measured now in {found.took_s:.0f} s"
    if load > _BUSY:
        how += ", beside other programs; --probe repeats it"
    try:
        kept.save(file, key, found)
    except OSError:
        how += "; not kept: no cache folder"
    return found, how


def _plain(measured: Measured | None) -> dict[str, object] | None:
    from dataclasses import asdict

    return asdict(measured) if measured is not None else None
