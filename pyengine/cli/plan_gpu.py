"""`pyengine plan` with a GPU: what of the model lies in VRAM, RAM and on disk, and how fast that is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pyengine.cli.output import DIM, ERROR, STRONG, console, format_bytes, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyengine.budget import Budget
    from pyengine.native import Device
    from pyengine.planning.gpu_plan import GpuLine, GpuPlan
    from pyengine.planning.gpu_probe import GpuMeasured
    from pyengine.planning.routing import Routing
    from pyengine.planning.shape import ModelShape

#: Runnable processes per core before a probe, from which it suffers.
_BUSY = 0.5


def device_for(gpu: str, vram_budget: Budget) -> tuple[Device | None, Budget]:
    """The device that `--gpu` names, if there is one, of several GPUs all as one; and the budget of its memory.

    Raises:
        UsageError: no device of that name, or budgets of several GPUs that cannot be added.
        BudgetError: a budget is not understood, or they are not as many as there are GPUs.
    """
    from pyengine import vram

    chosen = vram.choose(gpu, vram_budget, "auto")
    if chosen is None:
        return None, "auto"
    return vram.find(chosen.name), _sum(chosen.vram_budgets)


def _sum(budgets: Sequence[Budget]) -> Budget:
    """One budget for all of several GPUs: what is the same for each, or the sum of sizes."""
    from pyengine.budget import resolve
    from pyengine.errors import UsageError

    words = [budget for budget in budgets if isinstance(budget, str) and ("%" in budget or "auto" in budget.lower())]
    if not words:
        return sum(resolve(budget, slot_bytes=sys.maxsize, least=0, name="vram_budget") for budget in budgets)
    if len({budget.strip().lower() for budget in words}) == 1 and len(words) == len(budgets):
        return words[0]
    raise UsageError("vram_budget: plan takes several GPUs as one, so write one size, share or auto, or sizes to add")


def gpu_plan(
    shape: ModelShape,
    device: Device,
    vram_budget: Budget,
    ram_budget: Budget,
    n_ctx: int,
    routing: tuple[Routing, str],
    again: bool,
    no_probe: bool,
) -> tuple[GpuPlan, str]:
    """The plan, and where its speeds come from. Raises PyengineError."""
    from pyengine.budget import resolve
    from pyengine.planning.gpu_plan import make_gpu_plan
    from pyengine.planning.link import known_link
    from pyengine.planning.vram_needs import Room, on_device, read_sizes

    shape = on_device(shape, device.name)
    link = known_link(device, again=again)
    budgets = (vram_budget, ram_budget, n_ctx)
    # What cannot be planned is said before measuring.
    room = Room(shape, read_sizes(shape), n_ctx or shape.n_ctx_train, device)
    if room.tight:
        raise room.error()
    resolve(vram_budget, slot_bytes=shape.info.slot_bytes, least=shape.info.least_budget, name="vram_budget")
    measured, how = _measured(shape, device, again, no_probe)
    return make_gpu_plan(shape, device, *budgets, *routing, link, measured), how


def _measured(shape: ModelShape, device: Device, again: bool, no_probe: bool) -> tuple[GpuMeasured | None, str]:
    import psutil
    from llama_cpp._logger import set_verbose

    from pyengine.cli.interrupt import exit_on_interrupt
    from pyengine.cli.output import TerminalSpinner
    from pyengine.planning import gpu_probe
    from pyengine.planning.measured import save
    from pyengine.planning.probe import ProbeError

    set_verbose(False)
    key, file = gpu_probe.gpu_key(shape, device), gpu_probe.gpu_probe_file(shape.path, device)
    found = None if again else gpu_probe.load_gpu(file, key)
    if found is not None:
        return found, "measured earlier; --probe measures again"
    if no_probe:
        return None, f"no speeds: this model was not measured on {device.name}"
    doing = "Loading"
    load = psutil.getloadavg()[0] / (os.cpu_count() or 1)

    def say(text: str) -> None:
        nonlocal doing
        doing = text

    try:
        with TerminalSpinner(lambda: doing) as spinner, exit_on_interrupt(spinner.restore_terminal):
            found = gpu_probe.measure_on_gpu(shape, device, say)
    except ProbeError as reason:
        return None, f"no speeds: {reason}"
    how = f"measured now in {found.took_s:.0f} s"
    if load > _BUSY:
        how += ", beside other programs; --probe repeats it"
    try:
        save(file, key, found)
    except OSError:
        how += "; not kept: no cache folder"
    return found, how


def gpu_json(plan: GpuPlan, how: str) -> dict[str, Any]:
    """The plan as plain data, with where its speeds come from."""
    from dataclasses import asdict

    measured = None if plan.measured is None else asdict(plan.measured)
    return plan.as_json() | {"probe": how, "measured": measured}


def show_gpu(plan: GpuPlan, how: str) -> None:
    """Print the plan on standard output, in at most 80 columns."""
    screen = console(stderr=False)
    info, device = plan.shape.info, plan.device
    screen.print(Text(plan.shape.path.name, style=style(STRONG)))
    screen.print(
        f"{info.architecture}, {info.n_layer} layers of {info.n_expert} experts, {info.n_expert_used} per token"
    )
    screen.print(f"{device.name}, {device.description}")
    screen.print()
    screen.print(_places(plan))
    screen.print()
    screen.print(_budgets(plan))
    screen.print(Text("ms: per decoded token; bound: what alone would take longest", style=style(DIM)))
    screen.print()
    for name, text in _facts(plan, how):
        screen.print(Text(f"{name:>12}  ", style=style(DIM)) + Text(text))


def _facts(plan: GpuPlan, how: str) -> list[tuple[str, str]]:
    device, link = plan.device, plan.link
    free = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
    if device.unified:
        moving = "none: the GPU computes in RAM, and what is missing comes from the disk"
    elif link is None:
        moving = "not measured"
    else:
        moving = f"{link.bytes_per_s / 1e9:.3g} GB/s from RAM, {1e6 * link.latency_s:.2g} us for a copy to begin"
    facts = [
        ("VRAM", f"{free}; auto leaves {format_bytes(plan.left_bytes)}"),
        ("RAM", f"{format_bytes(plan.ram_available)} available"),
        ("link", moving),
    ]
    if plan.measured is not None:
        facts.append(("disk", f"{plan.measured.disk_bytes_per_s / 1e6:.0f} MB/s, several reads at a time"))
    largest = f"at most {plan.largest_context} tokens beside the least slots"
    return [*facts, ("context", largest), ("routing", plan.routing), ("speeds", how)]


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style(DIM), pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _places(plan: GpuPlan) -> Table:
    """What lies where with the budgets that were asked for."""
    table, line, info, needs = (
        _table("tier", "bytes", "experts", "share", "uses"),
        plan.chosen,
        plan.shape.info,
        plan.needs,
    )
    table.columns[0].justify = "left"
    table.add_column("")
    for size, what in (
        (needs.dense, "weights that are no experts"),
        (needs.kv, f"KV cache, {plan.n_ctx} tokens"),
        (needs.compute, "to compute, about"),
    ):
        table.add_row("VRAM", format_bytes(size), "", "", "", Text(what, style=style(DIM)))
    total = info.n_experts_total
    nowhere = max(0, total - line.slots - line.ram_slots)
    slot = info.slot_bytes / total
    for tier, slots, used, what in (
        ("VRAM", line.slots, line.shares[0], f"slots of {line.name}"),
        ("RAM", line.ram_slots, line.shares[1], "slots behind them"),
        ("disk", nowhere, line.shares[2], "what is in no slot then"),
    ):
        fits = tier != "VRAM" or line.fits
        note = Text(what, style=style(DIM)) if fits else Text("does not fit", style=style(ERROR))
        share = f"{100 * slots / total:.3g} %"
        table.add_row(tier, format_bytes(int(slots * slot)), str(slots), share, _percent(used), note)
    return table


def _budgets(plan: GpuPlan) -> Table:
    names = ["experts\nin VRAM", "slots'\nbytes", "it\nfits", "found\nVRAM", "\nRAM", "read\ndisk"]
    if plan.measured is not None:
        names += ["compute\nms", "link\nms", "disk\nms", "decode\ntok/s", "bound\nby"]
    table = _table(*names)
    table.padding = (0, 1, 0, 0)
    for line in plan.lines:
        fits = Text("yes") if line.fits else Text("no", style=style(ERROR))
        table.add_row(line.name, format_bytes(line.vram_bytes), fits, *map(_percent, line.shares), *_times(line))
    return table


def _times(line: GpuLine) -> list[str]:
    if line.time is None:
        return []
    time = line.time
    parts = [_figure(1e3 * seconds) for seconds in (time.compute_s, time.link_s, time.disk_s)]
    return [*parts, _figure(time.tokens_per_s), time.bound]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
