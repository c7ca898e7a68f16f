"""Planning a batch for a GPU before the model is open: costs as they are known, or measured now; the memory there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pyengine import Llama, vram
from pyengine.budget import Budget, available_memory, resolve
from pyengine.errors import UsageError
from pyengine.native import Device
from pyengine.planner.batch_plan import Place, attention_bytes_per_cell, demand_of, known_costs, save_measured
from pyengine.planner.costs import Costs
from pyengine.planner.gpu_measuring import costs_on_gpu
from pyengine.planner.solving import BatchPlan, Memory, Work, solve
from pyengine.planning.probe import ProbeError
from pyengine.planning.shape import ModelShape
from pyengine.planning.vram_needs import on_device

#: KV cells while it is measured.
_CONTEXT = 1024


def plan_on_gpu(
    shape: ModelShape,
    gpu: str,
    work: Work,
    *,
    vram_limit: int | None = None,
    ram_budget: Budget = "auto",
    trace: Path | None = None,
    again: bool = False,
    may_measure: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[BatchPlan, int, Place, str]:
    """How many texts to compute at once with slots in the memory of a GPU.

    KV cells, and what llama.cpp computes attention in, take that memory from the slots, as the other weights do.

    Args:
        gpu: as in pyengine.Llama.
        vram_limit: bytes of the GPU's memory for everything; None: what is free, less what is left to others.
        ram_budget: of experts in RAM behind it.
        again: measure, though it was measured before; may_measure: or else raise.

    Returns:
        The plan; the bytes it is for; the place; where the costs come from, a few words.

    Raises:
        UsageError: no such GPU, or nothing is known and nothing may be measured.
        DoesNotFitError: not even one such text fits.
        ProbeError, PyengineError, OSError: it cannot be measured.
    """
    chosen = vram.choose(gpu, "auto", ram_budget)
    if chosen is None:
        raise UsageError("this llama.cpp has no GPU to plan for")
    device = vram.find(chosen.name)
    shape = on_device(shape, device.name)
    behind = _ram_share(shape, device, ram_budget)
    place = Place(device, 0, behind >= 1)
    costs, how = None if again else known_costs(shape, place), "measured earlier, or learned from runs"
    if costs is None:
        if not may_measure:
            raise UsageError("nothing is known of this GPU with this model; measure without --no-probe")
        costs, how = measure_on_gpu(shape, device, ram_budget, say), "measured now"
        save_measured(shape, costs, place)
    costs = replace(costs, ram_share=behind)
    limit = device.free_bytes - vram.left_free(device) if vram_limit is None else vram_limit
    demand, words = demand_of(shape, trace=trace)
    per_cell = costs.kv_bytes_per_token + attention_bytes_per_cell(shape)
    memory = Memory(limit, shape.other_bytes, per_cell)
    return solve(costs, demand, shape, memory, work, routing=words), limit, place, how


def measure_on_gpu(
    shape: ModelShape, device: Device, ram_budget: Budget, say: Callable[[str], None] = lambda _: None
) -> Costs:
    """Load the model onto the device, compute some steps, close it. Raises as costs_on_gpu() and Llama do."""
    say(f"Loading onto {device.name}")
    llm = Llama(
        shape.path, gpu=device.name, ram_budget=ram_budget, policy="lru", look_ahead="off", n_ctx=_CONTEXT, n_batch=512
    )
    try:
        if llm.engine is None:
            raise ProbeError(llm.engaged)
        say("Measuring steps of many tokens")
        return costs_on_gpu(llm, shape)
    finally:
        llm.close()


def _ram_share(shape: ModelShape, device: Device, ram_budget: Budget) -> float:
    """Of all experts, those that RAM has room for, 0..1; memory that is one for both has no tier of its own."""
    if device.unified:
        return 0.0
    behind = resolve(ram_budget, slot_bytes=shape.info.slot_bytes, least=0, available=available_memory())
    return min(1.0, behind / shape.info.slot_bytes)
