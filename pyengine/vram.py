"""The GPU that experts are kept on, and how much of its memory they may take."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pyengine.budget import Budget, available_memory, check_wording, reserve, resolve
from pyengine.errors import UsageError
from pyengine.native import Device, ModelInfo, NativeEngine, devices

_log = logging.getLogger("pyengine")

#: Left free on the GPU beside slots when the budget is "auto": what kernels take for themselves while they run, and
#: other programs. A share of its memory, at least so many bytes.
_SHARE_LEFT, _LEAST_LEFT = 0.05, 512 << 20

#: If the GPU has less than it said, so much less is tried, until it fits.
_LESS = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU and the budgets of the tiers on it and behind it, as users write them."""

    device: str
    vram_budget: Budget
    ram_budget: Budget


def choose(gpu: str, vram_budget: Budget, ram_budget: Budget) -> Gpu | None:
    """The GPU to use, if any.

    Args:
        gpu: "auto" is the first that this build of llama.cpp finds, "off" none, otherwise ggml's name of a device.

    Raises:
        UsageError: there is no device of that name.
        BudgetError: a budget is not understood.
    """
    check_wording(vram_budget, "vram_budget")
    if gpu == "off":
        return None
    found = devices()
    if gpu == "auto":
        name = next((device.name for device in found if device.gpu), None)
        return None if name is None else Gpu(name, vram_budget, ram_budget)
    if gpu not in [device.name for device in found]:
        names = ", ".join(device.name for device in found)
        raise UsageError(f'gpu {gpu!r:.40} is not known to this llama.cpp, which has {names}; or write "auto" or "off"')
    return Gpu(gpu, vram_budget, ram_budget)


def find(name: str) -> Device:
    """The device of this name as it is now."""
    return next(device for device in devices() if device.name == name)


def left_free(device: Device) -> int:
    """Bytes that "auto" leaves free on the device."""
    return max(_LEAST_LEFT, int(_SHARE_LEFT * device.total_bytes), reserve() if device.unified else 0)


def start(native: NativeEngine, gpu: Gpu) -> None:
    """The least in VRAM, for llama.cpp comes first there; the RAM tier as a whole. Raises BudgetError, MemoryError."""
    native.use_gpu(gpu.device)
    info = native.info
    if find(gpu.device).unified:  # what the GPU reads is RAM: a copy of it elsewhere in RAM would be lost memory
        behind = 0
    else:
        behind = resolve(gpu.ram_budget, slot_bytes=info.slot_bytes, least=0, available=available_memory())
    native.start_on_gpu(info.least_budget, behind)


def settle(native: NativeEngine, info: ModelInfo, gpu: Gpu) -> int:
    """VRAM slots within the budget, once llama.cpp has taken what it needs; returns the bytes. If that much turns out
    not to be there, less is taken, and said. Raises BudgetError; MemoryError if not even the least is there."""
    stats = native.stats()
    device = find(gpu.device)
    wanted = resolve(
        gpu.vram_budget,
        slot_bytes=info.slot_bytes,
        least=info.least_budget,
        available=device.free_bytes + stats["budget_bytes"] - left_free(device),
        name="vram_budget",
    )
    while True:
        try:
            native.set_vram_budget(wanted)
            return wanted
        except MemoryError:
            if wanted == info.least_budget:
                raise
            less = max(info.least_budget, int(wanted * _LESS))
            _log.warning(
                "%s has no %.1f MiB left for experts: trying %.1f MiB", gpu.device, wanted / 2**20, less / 2**20
            )
            wanted = less


def fill(native: NativeEngine, info: ModelInfo) -> None:
    """Every expert has a slot: begin to load all of them, as far as they are absent."""
    for layer in range(info.n_layer):
        native.expect(layer, range(info.n_expert), keep=True)
