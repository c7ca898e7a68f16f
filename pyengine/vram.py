"""The GPUs that experts are kept on, which layers are whose, and how much of their memory experts may take."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import llama_cpp

from pyengine.budget import Budget, available_memory, check_wording, reserve, resolve
from pyengine.errors import BudgetError, UsageError
from pyengine.native import Device, GpuPart, ModelInfo, NativeEngine, devices, find_device
from pyengine.pressure import PressureWatch, half_the_reserve

_log = logging.getLogger("pyengine")

#: Left free on the GPU beside slots when the budget is "auto": what kernels take for themselves while they run, and
#: other programs. A share of its memory, at least so many bytes. Weights, KV cache and compute buffers come before.
_SHARE_LEFT, _LEAST_LEFT = 0.05, 512 << 20

#: Memory in which all experts certainly find room beside the rest of a model, its KV cache and buffers: so many times
#: what experts take, and bytes besides.
_AMPLE, _AMPLE_BYTES = 1.5, 4 << 30

#: Seconds between looks at how much memory a GPU has left. Many tokens are computed in a second,
#: and a kernel that finds none ends the process.
_PERIOD = 0.05

_NAME = "vram_budget"

#: One for all GPUs together, or one for each; as a text with commas, too.
Budgets = Budget | Sequence[Budget]


@dataclass(frozen=True)
class Split:
    """How llama_cpp.Llama is told to divide a model among GPUs; its own defaults."""

    mode: int = llama_cpp.LLAMA_SPLIT_MODE_LAYER
    main_gpu: int = 0
    shares: Sequence[float] | None = None
    n_gpu_layers: int = -1


@dataclass(frozen=True)
class Gpus:
    """GPUs in use and the budgets of the tiers on them and behind them, as users write them.

    Attributes:
        devices: ggml's names, in the order that llama.cpp is given them.
        shares: of the layers, one for each, not all zero; llama.cpp must be given the same.
        n_gpu_layers: as llama.cpp's.
        vram_budgets: one for all together, or one for each.
        ram_budget: of the tier that all of them share.
        host_threads: that compute experts which lie in RAM while others are moved; 0: all are moved.
    """

    devices: tuple[str, ...]
    vram_budgets: tuple[Budget, ...]
    ram_budget: Budget
    shares: tuple[float, ...] = field(default=(1.0,))
    n_gpu_layers: int = -1
    host_threads: int = 0

    @property
    def name(self) -> str:
        """The devices as a user may write them."""
        return ",".join(self.devices)


def check_budgets(budgets: Budgets, n_gpu: int | None = None) -> tuple[Budget, ...]:
    """One budget for all GPUs, or one for each of `n_gpu`, if that is known. Raises BudgetError."""
    if isinstance(budgets, str):
        given: tuple[Budget, ...] = tuple(_number_or_text(part) for part in budgets.split(","))
    else:
        given = tuple(budgets) if isinstance(budgets, Sequence) else (budgets,)
    for budget in given:
        check_wording(budget, _NAME)
    if n_gpu is not None and len(given) not in (1, n_gpu):
        raise BudgetError(f"{_NAME} has {len(given)} sizes for {n_gpu} GPU{'s' * (n_gpu != 1)}; write one, or one each")
    if not given:
        raise BudgetError(f"{_NAME} is empty")
    return given


def _number_or_text(part: str) -> Budget:
    return int(part) if part.strip().isascii() and part.strip().isdigit() else part


def choose(
    gpu: str | Sequence[str],
    vram_budget: Budgets,
    ram_budget: Budget,
    split: Split | None = None,
    *,
    host_threads: int = 0,
) -> Gpus | None:
    """The GPUs to use, if any.

    Args:
        gpu: "auto" is all that this build of llama.cpp finds and would use, "off" none, otherwise ggml's names of
            devices, in a sequence or with commas.
        split: split_mode "none" takes main_gpu, of these, alone.

    Raises:
        UsageError: there is no device of that name, or tensor_split or main_gpu fits none.
        BudgetError: a budget is not understood.
    """
    check_budgets(vram_budget)
    split = split or Split()
    if gpu == "off":
        return None
    found = devices()
    names = _all_of(found) if gpu == "auto" else _named(gpu, found)
    if split.mode == llama_cpp.LLAMA_SPLIT_MODE_NONE and names:
        if split.main_gpu < 0:  # llama.cpp's word for none
            return None
        if split.main_gpu >= len(names):
            raise UsageError(f"main_gpu {split.main_gpu} is not one of the {len(names)} GPUs in use")
        names = [names[split.main_gpu]]
    if not names:
        return None
    if split.mode not in (llama_cpp.LLAMA_SPLIT_MODE_NONE, llama_cpp.LLAMA_SPLIT_MODE_LAYER):
        raise UsageError('experts in VRAM need split_mode "layer" or "none": matrices cannot be divided; or gpu="off"')
    budgets = check_budgets(vram_budget, len(names))
    return Gpus(
        tuple(names), budgets, ram_budget, _shares(split.shares, names, found), split.n_gpu_layers, host_threads
    )


def _all_of(found: Sequence[Device]) -> list[str]:
    """What llama.cpp would use by itself: every GPU once, whichever back-ends know it; integrated ones if there is no
    other."""
    kept: list[Device] = []
    for device in found:
        if device.gpu and not (device.device_id and device.device_id in [k.device_id for k in kept]):
            kept.append(device)
    apart = [device.name for device in kept if not device.unified]
    return apart or [device.name for device in kept][:1]


def _named(gpu: str | Sequence[str], found: Sequence[Device]) -> list[str]:
    names = [name.strip() for name in (gpu.split(",") if isinstance(gpu, str) else gpu)]
    known = {device.name: device for device in found}
    for name in names or [""]:
        if name not in known:
            raise UsageError(
                f"gpu {name!r:.40} is not known to this llama.cpp, which has {', '.join(known)}; "
                'or write "auto" or "off"'
            )
        if known[name].gpu and names.count(name) > 1:
            raise UsageError(f"gpu {name} is named twice")
    return names


def _shares(given: Sequence[float] | None, names: Sequence[str], found: Sequence[Device]) -> tuple[float, ...]:
    """Of the layers, as llama.cpp has it: by tensor_split, or without one by free memory."""
    shares = [float(share) for share in given or ()]
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise UsageError("tensor_split must be numbers that are not negative")
    shares = (shares + [0.0] * len(names))[: len(names)]
    if any(shares):
        return tuple(shares)
    free = {device.name: float(device.free_bytes) for device in found}
    return tuple(free[name] for name in names) if any(free[name] for name in names) else (1.0,) * len(names)


def find(name: str) -> Device:
    """The device of this name as it is now; of several names, with commas, all of them as one with their memory."""
    found = [find_device(part) for part in name.split(",")]
    return replace(
        found[0],
        name=name,
        free_bytes=sum(device.free_bytes for device in found),
        total_bytes=sum(device.total_bytes for device in found),
        unified=all(device.unified for device in found),
    )


def left_free(device: Device) -> int:
    """Bytes that "auto" leaves free on the device; where memory is the machine's, the machine's reserve at least."""
    return max(_LEAST_LEFT, int(_SHARE_LEFT * device.total_bytes), reserve() if device.unified else 0)


def start(native: NativeEngine, gpus: Gpus) -> None:
    """The least in VRAM, for llama.cpp comes first there; the RAM tier as a whole. Raises BudgetError, MemoryError."""
    native.use_gpus(gpus.devices, gpus.shares, gpus.n_gpu_layers)
    native.start_on_gpu(native.info.least_budget, _at_first_behind(native, gpus))
    native.set_host_threads(gpus.host_threads)


def _at_first_behind(native: NativeEngine, gpus: Gpus) -> int:
    """Bytes of slots in RAM, before anybody knows what llama.cpp takes of VRAM. Raises BudgetError."""
    free = sum(device.free_bytes - left_free(device) for device in map(find, gpus.devices))
    all_wanted = gpus.vram_budgets in (("auto",), ("100%",)) and gpus.n_gpu_layers < 0
    ample = free > _AMPLE * native.info.slot_bytes + _AMPLE_BYTES
    if _unified(gpus) or (gpus.ram_budget == "auto" and all_wanted and ample):  # RAM would hold nothing
        return 0
    return _behind(native, gpus, 0)


def set_ram_tier(native: NativeEngine, gpus: Gpus) -> None:
    """Slots in RAM within the budget, anew. Raises BudgetError, MemoryError; UsageError if there is no such tier."""
    if _unified(gpus):
        raise UsageError(
            f"the memory of {gpus.name} is RAM, with no tier behind it; set_vram_budget() changes its slots"
        )
    stats = native.stats()
    filled = stats["ram_resident"] / max(1, stats["ram_slots"])  # memory that was never written to may not be taken yet
    native.set_ram_budget(_behind(native, gpus, int(filled * stats["ram_budget_bytes"])))


def _unified(gpus: Gpus) -> bool:
    """What an integrated GPU reads is RAM: a copy of it elsewhere in RAM would be lost memory."""
    return all(find(name).unified for name in gpus.devices)


def _behind(native: NativeEngine, gpus: Gpus, mine: int) -> int:
    """Bytes of slots in RAM, if so many bytes are taken for them already. Raises BudgetError."""
    return resolve(gpus.ram_budget, slot_bytes=native.info.slot_bytes, least=0, available=available_memory() + mine)


def settle(native: NativeEngine, gpus: Gpus) -> None:
    """VRAM slots within the budgets, once llama.cpp has taken what it needs. If that much turns out not to be there,
    less is taken, and said. Raises BudgetError; MemoryError if not even the least is there."""
    parts = native.gpus()
    for number, wanted in enumerate(_wanted(parts, gpus)):
        if parts[number].n_layer > 0:
            _take(native, number, parts[number], wanted)


def _take(native: NativeEngine, number: int, part: GpuPart, wanted: int) -> int:
    """Returns the budget that is in force then, bytes."""
    taken = native.set_vram_budget(wanted, number)
    if taken < wanted:
        _log.warning("%s has no %.1f MiB left for experts: taking %.1f MiB", part.name, wanted / 2**20, taken / 2**20)
    return taken


def _wanted(parts: Sequence[GpuPart], gpus: Gpus) -> list[int]:
    """Bytes of slots on each GPU."""
    room = [_room(part) // gpus.devices.count(part.name) for part in parts]
    if len(gpus.vram_budgets) == len(parts) or gpus.vram_budgets == ("auto",):
        each = gpus.vram_budgets * (len(parts) // len(gpus.vram_budgets))
        return [
            resolve(budget, slot_bytes=part.slot_bytes, least=part.least_budget, available=spare, left=0, name=_NAME)
            for budget, part, spare in zip(each, parts, room, strict=True)
        ]
    total = resolve(
        gpus.vram_budgets[0],
        slot_bytes=sum(part.slot_bytes for part in parts),
        least=sum(part.least_budget for part in parts),
        name=_NAME,
    )
    taken = shared(total, [(part.least_budget, part.slot_bytes) for part in parts], room)
    if sum(taken) < total:
        _log.warning("the GPUs have no %.1f MiB left for experts: taking %.1f MiB", total / 2**20, sum(taken) / 2**20)
    return taken


def _room(part: GpuPart) -> int:
    """Bytes that slots may take on a GPU, if it is left enough for everything else."""
    device = find(part.name)
    return device.free_bytes + part.budget_bytes - left_free(device)


def shared(total: int, limits: Sequence[tuple[int, int]], room: Sequence[int]) -> list[int]:
    """A budget for all GPUs, in proportion of what each has beyond its least; what one has no room for goes to others.

    Args:
        total: bytes, at least the sum of the least.
        limits: for each GPU the least and the most that its layers can use, bytes.
        room: bytes free on each; the least is taken in any case.
    """
    taken = [least for least, _ in limits]
    most = [max(least, min(full, free)) for (least, full), free in zip(limits, room, strict=True)]
    while (left := total - sum(taken)) > 0:
        open_ = [i for i in range(len(taken)) if taken[i] < most[i]]
        weight = sum(limits[i][1] - limits[i][0] for i in open_)
        if not open_:
            break
        for i in open_:
            more = left if i == open_[-1] else left * (limits[i][1] - limits[i][0]) // weight
            taken[i] += min(more, most[i] - taken[i], total - sum(taken))
    return taken


def fill(native: NativeEngine, info: ModelInfo) -> None:
    """Every expert has a slot: begin to load all of them, as far as they are absent."""
    for layer in range(info.n_layer):
        native.expect(layer, range(info.n_expert), keep=True)


def watches(native: NativeEngine, changed: Callable[[], None]) -> list[PressureWatch]:
    """One for each GPU with experts, not started: when others take its memory, experts give some of theirs, because
    the kernels and the driver end the process if they get none. `changed` is called when it has happened, and when
    they have taken some back."""
    return [_watch(native, number, part, changed) for number, part in enumerate(native.gpus()) if part.n_layer > 0]


def _watch(native: NativeEngine, number: int, part: GpuPart, changed: Callable[[], None]) -> PressureWatch:
    floor = half_the_reserve() if find(part.name).unified else _LEAST_LEFT // 2

    def take(budget: int) -> int:
        try:
            return _take(native, number, part, budget)
        except MemoryError as error:  # the next token says so, too
            _log.error("%s: %s", part.name, error)
            return 0  # until some is free again

    return PressureWatch(
        part.budget_bytes,
        part.least_budget,
        take,
        lambda: find(part.name).free_bytes,
        lambda: floor,
        part.name,
        _PERIOD,
        changed,
    )


def places(parts: Sequence[GpuPart]) -> str:
    """Which memory holds the slots, for people."""
    if len(parts) == 1:
        return f"memory of {parts[0].name}"
    each = [f"{part.name} ({part.n_layer} layers, {part.slots} slots)" for part in parts]
    return f"memory of {', '.join(each[:-1])} and {each[-1]}"
