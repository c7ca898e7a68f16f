"""A short run of the model on a GPU, to learn what this machine does with it there."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.budget import available_memory, reserve
from pyengine.cache import cache_dir
from pyengine.errors import BudgetError
from pyengine.native import Device
from pyengine.planning.controlled_run import ControlledRun, budget_of_one_token
from pyengine.planning.disk import measure_disk
from pyengine.planning.link import LinkSpeed
from pyengine.planning.measured import machine_key
from pyengine.planning.probe import ProbeError
from pyengine.planning.shape import ModelShape
from pyengine.planning.tiers import LOOK_S, TierCosts
from pyengine.planning.vram_needs import VramNeeds, read_sizes
from pyengine.vram import left_free

if TYPE_CHECKING:
    from pyengine import Llama

_CONTEXT = 256
_PROMPT = 16
#: RAM behind the slots of one token: as many tokens' experts as take turns in ControlledRun, and one more.
_RAM_TOKENS = 4
#: The whole model is read into VRAM if that takes no longer, seconds.
_FILL_S = 15.0
#: The CPU may compute some of what is missing, so that not all of it is copied; but not most of it.
_LEAST_OF_COPYING = 0.3


@dataclass(frozen=True)
class GpuMeasured:
    """Seconds unless the name says otherwise."""

    found_s: float
    """one decoded token with a part of the experts in VRAM, and all that it needs"""
    resident_s: float | None
    """one with every expert in VRAM; None where they have no room, or reading them would take too long"""
    move_s: float
    """more for each expert that is in RAM and not in VRAM"""
    disk_bytes_per_s: float
    """random direct reads of whole matrices of experts, several at a time"""
    took_s: float

    def costs(self, shape: ModelShape, link: LinkSpeed | None) -> TierCosts:
        """What tiers.token_time() takes. link: None where nothing is moved from RAM, so that a miss is a read."""
        n_layer = shape.info.n_layer
        read = shape.expert_bytes / self.disk_bytes_per_s
        resident = self.resident_s if self.resident_s is not None else max(self.found_s - n_layer * LOOK_S, 1e-6)
        return TierCosts(
            resident_s=resident,
            look_s=max(0.0, self.found_s - resident) / n_layer,
            move_s=0.0 if link is None else self._move_s(link.seconds(shape.expert_bytes, shape.classes[0].n_matrix)),
            read_s=max(read, self.move_s) if link is None else read,
        )

    def _move_s(self, copying: float) -> float:
        """What was measured, unless it is so little beside copying alone that other programs must have disturbed it."""
        return self.move_s if self.move_s >= _LEAST_OF_COPYING * copying else copying


def measure_on_gpu(shape: ModelShape, device: Device, say: Callable[[str], None] = lambda _: None) -> GpuMeasured:
    """Load the model with slots for one token's experts in VRAM and measure it. Takes some seconds.

    Args:
        shape: with slots of the size that they have on the device.

    Raises:
        ProbeError: too little memory for it, or the model is not managed.
        PyengineError, OSError: the model cannot be loaded or read.
    """
    from pyengine import Llama

    started = time.perf_counter()
    budget, needs = budget_of_one_token(shape), read_sizes(shape).needs(_CONTEXT)
    if budget + needs.total > device.free_bytes:
        raise ProbeError(f"{device.name} has too little free memory to measure this model")
    behind = 0 if device.unified else max(0, min(_RAM_TOKENS * budget, available_memory() - reserve()))
    say(f"Loading onto {device.name}")
    llm = Llama(
        shape.path,
        gpu=device.name,
        vram_budget=budget,
        ram_budget=behind,
        policy="lru",
        look_ahead="off",
        n_ctx=_CONTEXT,
    )
    try:
        if llm.engine is None:
            raise ProbeError(llm.engaged)
        run = ControlledRun(llm, shape)
        if run.most_missing == 0:
            raise ProbeError("every token uses every expert of this model")
        say("Measuring tokens")
        run.prompt(_PROMPT, 0)
        found = _typical(step.wall for step in run.samples(lambda: run.decode(0, _PROMPT)))
        move = _move_seconds(run, found)
        say("Reading the disk")
        disk = measure_disk(shape.path, int(shape.expert_bytes / shape.classes[0].n_matrix))
        say("Filling VRAM")
        resident = _all_resident(llm, run, shape, device, needs, disk.bytes_per_s)
    finally:
        llm.close()
    return GpuMeasured(found, resident, move, disk.bytes_per_s, time.perf_counter() - started)


def _move_seconds(run: ControlledRun, found: float) -> float:
    """What a missing expert adds to a token, by the slope between few and many."""
    points = []
    for m in sorted({1, run.most_missing}):
        steps = [s for s in run.samples(lambda m=m: run.decode(m, _PROMPT)) if s.misses]  # type: ignore[misc]
        if steps:
            misses = statistics.median(s.misses for s in steps)
            points.append((misses, max(0.0, _typical(s.wall for s in steps) - found)))
    if not points:
        raise ProbeError("so few experts stay in memory that none can be made to be missing")
    return sum(seconds for _, seconds in points) / sum(misses for misses, _ in points)


def _all_resident(
    llm: Llama, run: ControlledRun, shape: ModelShape, device: Device, needs: VramNeeds, disk_bytes_per_s: float
) -> float | None:
    whole = shape.info.slot_bytes
    if whole + needs.total + left_free(device) > device.free_bytes or whole / disk_bytes_per_s > _FILL_S:
        return None
    try:
        llm.set_vram_budget("100%")
    except (BudgetError, MemoryError):
        return None
    end = time.perf_counter() + 2 * _FILL_S
    while llm.expert_stats()["resident"] < shape.info.n_experts_total:
        if time.perf_counter() > end:
            return None
        run.decode(0, _PROMPT)
        time.sleep(0.01)
    return _typical(step.wall for step in run.samples(lambda: run.decode(0, _PROMPT)))


def _typical(values: Iterable[float]) -> float:
    """The middle of the faster half: other programs only ever make a sample slower."""
    ordered = sorted(values)
    return statistics.median(ordered[: len(ordered) // 2 + 1])


def gpu_key(shape: ModelShape, device: Device) -> dict[str, Any]:
    """What must be equal for a measurement to hold. Raises OSError: no such model."""
    return machine_key(shape.path, bundle=False) | {
        "device": [device.name, device.description, device.total_bytes, device.unified]
    }


def gpu_probe_file(model: Path, device: Device) -> Path:
    """Where what was measured with this model on this device is kept. Raises OSError: no such model."""
    safe = "".join(c if c.isalnum() else "_" for c in device.name)
    return cache_dir() / "probes" / f"{model.stem}-{model.stat().st_size:x}-{safe}.json"


def load_gpu(path: Path, key: dict[str, Any]) -> GpuMeasured | None:
    """The measurement of that key; None if there is none, or the file is not as it should be."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        measured = GpuMeasured(**kept["measured"])
        numbers = [float(value) for value in asdict(measured).values() if value is not None]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    sane = all(math.isfinite(n) and n >= 0 for n in numbers) and measured.found_s > 0
    return measured if sane and measured.disk_bytes_per_s > 0 else None
