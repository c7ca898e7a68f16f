"""The native engine as a Python object: the only module that touches cffi.

Mirrors native/include/pyengine.h, which has the meaning of every field. Codes become exceptions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import fsencode
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: F401  (first: its libraries are what ours resolves against)
import numpy as np
import numpy.typing as npt

from pyengine._native import ffi, lib
from pyengine.errors import (
    BudgetError,
    ExpertReadError,
    ModelFileError,
    PyengineError,
    StaleBundleError,
    UnmanagedModelError,
    UsageError,
    one_line,
)

_ERRORS: dict[int, type[PyengineError]] = {
    lib.PYE_E_FILE: ModelFileError,
    lib.PYE_E_FORMAT: ModelFileError,
    lib.PYE_E_UNSUPPORTED: UnmanagedModelError,
    lib.PYE_E_BUDGET: BudgetError,
    lib.PYE_E_STATE: UsageError,
    lib.PYE_E_STALE: StaleBundleError,
}

#: pye_event, see the header. `kind` is 0 hit, 1 miss, 2 eviction, 3 prefetch.
EVENT = np.dtype([("step", "<u4"), ("layer", "<u2"), ("expert", "<u2"), ("kind", "<u2"), ("tokens", "<u2")])


#: pye_span, see the header: times in nanoseconds since set_timeline(True); `kind` is PYE_SPAN_*.
SPAN = np.dtype(
    [
        ("begin_ns", "<u8"),
        ("end_ns", "<u8"),
        ("kind", "<u2"),
        ("layer", "<u2"),
        ("expert", "<u2"),
        ("flags", "<u2"),
    ]
)


@dataclass(frozen=True)
class ModelInfo:
    """What the file says about its experts; sizes in bytes. See pye_info."""

    architecture: str
    kernels: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_class: int
    n_file: int
    direct_io: bool
    bundle: bool
    bundle_repacked: bool
    n_experts_total: int
    file_bytes: int
    expert_bytes: int
    slot_bytes: int
    least_budget: int
    expert_used_bytes: int


#: Guesses that come true less often are not worth a read; measured on the widened bundled model.
LEAST_CHANCE = 0.4

#: Tables of 60,000 experts.
_LIKELY_TABLE_BYTES = 1 << 20

_FLAGS = ("direct_io", "bundle", "bundle_repacked")


def _check(code: int) -> None:
    if code != lib.PYE_OK:
        message = one_line(ffi.string(lib.pye_last_error()).decode("utf-8", "replace"))
        if code == lib.PYE_E_MEMORY:
            raise MemoryError(message)
        raise _ERRORS.get(code, PyengineError)(message)


def built_for() -> str:
    """Versions the native part was built for, e.g. "0.3.36 ggml 0.25.3"."""
    return str(ffi.string(lib.pye_built_for()).decode())


@dataclass(frozen=True)
class Device:
    """Something that llama.cpp can compute on here, see pye_device; sizes in bytes."""

    name: str
    description: str
    device_id: str
    free_bytes: int
    total_bytes: int
    gpu: bool
    unified: bool


def devices() -> list[Device]:
    """All that this build of llama.cpp knows and this machine has."""
    found: list[Device] = []
    raw = ffi.new("pye_device *")
    while lib.pye_get_device(len(found), raw) == lib.PYE_OK:
        found.append(_described(raw))
    return found


def find_device(name: str) -> Device:
    """The one of this name as it is now; the others are not asked. Raises PyengineError: there is none."""
    raw = ffi.new("pye_device *")
    _check(lib.pye_find_device(name.encode(), raw))
    return _described(raw)


def _described(raw: Any) -> Device:
    name, what, number = (
        ffi.string(text).decode("utf-8", "replace") for text in (raw.name, raw.description, raw.device_id)
    )
    return Device(name, what, number, raw.free_bytes, raw.total_bytes, bool(raw.gpu), bool(raw.unified))


@dataclass(frozen=True)
class GpuPart:
    """What one of the GPUs in use has of a model, see pye_gpu; sizes in bytes."""

    name: str
    n_layer: int
    slot_bytes: int
    least_budget: int
    budget_bytes: int
    slots: int
    resident: int
    ffns: int


#: Version of the bundle's format.
BUNDLE_VERSION: int = lib.PYE_BUNDLE_VERSION


def struct_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a C struct of pyengine.h, e.g. "pye_bundle_header"; texts are bytes up to their zero."""
    return _dtype_of(ffi.typeof(name))


def _dtype_of(ctype: Any) -> np.dtype[Any]:
    if ctype.kind == "primitive":
        return np.dtype(f"<{'i' if ctype.cname.startswith('int') else 'u'}{ffi.sizeof(ctype)}")
    if ctype.kind == "array":
        if ctype.item.cname == "char":
            return np.dtype(f"S{ctype.length}")
        return np.dtype((_dtype_of(ctype.item), (ctype.length,)))
    return np.dtype(
        {
            "names": [name for name, _ in ctype.fields],
            "formats": [_dtype_of(field.type) for _, field in ctype.fields],
            "offsets": [field.offset for _, field in ctype.fields],
            "itemsize": ffi.sizeof(ctype),
        }
    )


def checksum(content: bytes | bytearray | memoryview) -> int:
    """XXH3 (64 bits, seed 0) of the bytes, as bundles use it."""
    return int(lib.pye_checksum(ffi.from_buffer(content), memoryview(content).nbytes))


@dataclass(frozen=True, eq=False)
class NativePredictor:
    """What set_predictors() takes; float32 arrays, see pye_predictor."""

    source: int
    target: int
    take: int
    w1: npt.NDArray[np.float32] | None
    b1: npt.NDArray[np.float32] | None
    w2: npt.NDArray[np.float32]
    b2: npt.NDArray[np.float32]
    chances: npt.NDArray[np.float32] | None


class NativeEngine:
    """One model's experts.

    Raises:
        ModelFileError: the file is missing, not GGUF, truncated, or its numbers contradict each other.
        UnmanagedModelError: a valid model without experts, or with experts stored in an unknown way.
    """

    def __init__(self, path: str | Path) -> None:
        self._handle: Any = None
        out = ffi.new("pye_engine **")
        _check(lib.pye_open(fsencode(path), out))
        self._handle = out[0]
        #: Bytes per second, see set_link_limit().
        self.link_limit = 0
        self._notice = ffi.new("char[1024]")

    @property
    def info(self) -> ModelInfo:
        raw = ffi.new("pye_info *")
        _check(lib.pye_get_info(self._open(), raw))
        text = {name: ffi.string(getattr(raw, name)).decode("utf-8", "replace") for name in ("architecture", "kernels")}
        numbers = {name: getattr(raw, name) for name, _ in ffi.typeof("pye_info").fields if name not in text}
        return ModelInfo(**text, **(numbers | {name: bool(numbers[name]) for name in _FLAGS}))

    def bundle_tables(self, raw: bool) -> bytearray:
        """Header and tables of a bundle of this model for this machine, see pye_bundle_header; before start().
        Raises ModelFileError."""
        needed = ffi.new("uint64_t *")
        out = bytearray(_LIKELY_TABLE_BYTES)  # asking for the size alone would read and repack as much as the answer
        _check(lib.pye_bundle_tables(self._open(), raw, ffi.from_buffer(out), len(out), needed))
        if needed[0] > len(out):
            out = bytearray(needed[0])
            _check(lib.pye_bundle_tables(self._open(), raw, ffi.from_buffer(out), len(out), needed))
        return out[: needed[0]]

    def bundle_record(self, raw: bool, layer: int, expert: int, out: Any) -> None:
        """Fill `out`, a writable buffer of record_bytes bytes, with the record of one expert; before start().
        Raises ModelFileError."""
        _check(lib.pye_bundle_record(self._open(), raw, layer, expert, ffi.from_buffer(out, require_writable=True)))

    def use_bundle(self, path: str | Path) -> None:
        """Read misses from this bundle; before start(). Raises StaleBundleError, ModelFileError if it is damaged or
        incomplete."""
        _check(lib.pye_use_bundle(self._open(), fsencode(path)))

    def use_experts(self, n_expert_used: int) -> None:
        """Routers choose so many experts for each token, as llama.cpp is told by an override of what the file says;
        before start() and use_bundle(). Raises PyengineError: a layer has fewer."""
        _check(lib.pye_use_experts(self._open(), n_expert_used))

    def start(self, ram_budget: int) -> None:
        """Make slots for `ram_budget` bytes. Raises BudgetError, MemoryError."""
        _check(lib.pye_start(self._open(), ram_budget))

    def use_gpus(self, devices: Sequence[str], shares: Sequence[float] | None = None, n_gpu_layers: int = -1) -> None:
        """Keep slots on the ggml devices of these names; once, before start_on_gpu(). Changes info.least_budget.

        Args:
            devices: each has the layers that llama.cpp gives it, see pye_use_gpus.
            shares: of the layers, as llama.cpp's tensor_split; None: equal ones.
            n_gpu_layers: as llama.cpp's.
        """
        names = [ffi.new("char[]", device.encode()) for device in devices]
        split = [1.0] * len(names) if shares is None else list(shares)
        if len(split) != len(names):
            raise UsageError(f"{len(split)} shares of the layers do not fit {len(names)} GPUs")
        _check(lib.pye_use_gpus(self._open(), names, split, len(names), n_gpu_layers))

    def gpus(self) -> list[GpuPart]:
        """The GPUs in use, as they were named."""
        parts: list[GpuPart] = []
        raw = ffi.new("pye_gpu *")
        while lib.pye_gpu_device(self._open(), len(parts)) != ffi.NULL:
            _check(lib.pye_get_gpu(self._open(), len(parts), raw))
            numbers = {name: getattr(raw, name) for name, _ in ffi.typeof("pye_gpu").fields if name != "name"}
            parts.append(GpuPart(ffi.string(raw.name).decode("utf-8", "replace"), **numbers))
        return parts

    def start_on_gpu(self, vram_budget: int, ram_budget: int) -> None:
        """Make slots for `vram_budget` bytes, with `ram_budget` bytes of experts in RAM behind them. Raises
        BudgetError, MemoryError, StaleBundleError if the bundle is for a CPU."""
        _check(lib.pye_start_on_gpu(self._open(), vram_budget, ram_budget))

    @property
    def gpu_devices(self) -> list[int]:
        """Addresses of the ggml_backend_devices for llama_model_params.devices; none without a GPU."""
        addresses: list[int] = []
        while address := int(ffi.cast("uintptr_t", lib.pye_gpu_device(self._open(), len(addresses)))):
            addresses.append(address)
        return addresses

    def set_vram_budget(self, vram_budget: int, gpu: int | None = None) -> int:
        """Change the bytes of slots in VRAM while the engine runs: on the GPU of this number, or on all, in proportion
        of their experts. Returns the budget in force: less, if there turned out to be less memory. Raises BudgetError;
        MemoryError if not even the least was there, after which nothing can be computed until a call succeeds."""
        in_force = ffi.new("uint64_t *")
        _check(lib.pye_set_vram_budget(self._open(), -1 if gpu is None else gpu, vram_budget, in_force))
        return int(in_force[0])

    def limit_vram(self, gpu: int, n_bytes: int) -> None:
        """For tests: from the next budget on, this GPU has no more than so many bytes for slots."""
        _check(lib.pye_limit_vram(self._open(), gpu, n_bytes))

    def fill_ram(self) -> None:
        """With a GPU: read experts into empty slots in RAM, best first, while the disk has nothing else to do. Returns
        at once."""
        _check(lib.pye_fill_ram(self._open()))

    def set_link_limit(self, bytes_per_s: int) -> None:
        """For benchmarks: the most that moves from RAM to VRAM, and back; 0 is no limit."""
        _check(lib.pye_set_link_limit(self._open(), bytes_per_s))
        self.link_limit = bytes_per_s

    def set_host_threads(self, n: int) -> None:
        """With a GPU: let so many threads compute, where it is faster, experts that lie in RAM; 0 moves all of them."""
        _check(lib.pye_set_host_threads(self._open(), n))

    @property
    def buffer_type(self) -> int:
        """Address of the ggml_backend_buffer_type for llama_model_params.tensor_buft_overrides."""
        return int(ffi.cast("uintptr_t", lib.pye_buffer_type(self._open())))

    def set_ram_budget(self, ram_budget: int) -> None:
        """Change the bytes of slots in RAM while the engine runs. With a GPU they are empty afterwards, unless there
        are as many as before. Raises BudgetError; MemoryError, if possible with the old ones kept."""
        _check(lib.pye_set_ram_budget(self._open(), ram_budget))

    def set_priorities(self, priorities: npt.NDArray[np.float32]) -> None:
        """Advice on what to keep: float32 [n_layer, n_expert], higher stays longer, ties go by age."""
        values = np.ascontiguousarray(priorities, dtype=np.float32)
        _check(lib.pye_set_priorities(self._open(), ffi.from_buffer("float[]", values), values.size))

    def set_predictors(self, predictors: Sequence[NativePredictor]) -> None:
        """What to guess with from now on; none: nothing. Raises PyengineError if one does not fit the model."""
        raw = ffi.new("pye_predictor[]", len(predictors))
        alive = []  # until the call has copied them
        for to, given in zip(raw, predictors, strict=True):
            to.source, to.target, to.take = given.source, given.target, given.take
            to.n_expert, width = given.w2.shape
            to.n_in = width if given.w1 is None else given.w1.shape[1]
            to.n_hidden = 0 if given.w1 is None else given.w1.shape[0]
            for name in ("w1", "b1", "w2", "b2", "chances"):
                array = getattr(given, name)
                if array is not None:
                    alive.append(ffi.from_buffer("float[]", np.ascontiguousarray(array, dtype=np.float32)))
                    setattr(to, name, alive[-1])
        _check(lib.pye_set_predictors(self._open(), raw, len(predictors)))

    def set_prefetch_rules(
        self,
        *,
        least_chance: float = LEAST_CHANCE,
        replay_recall: float = -1.0,
        replay_distance: int = 1,
        preempt: bool = True,
        reorder: bool = True,
    ) -> None:
        """What is prefetched and how, see pye_prefetch_rules."""
        rules = ffi.new("pye_prefetch_rules *")
        rules.least_chance, rules.replay_recall = least_chance, replay_recall
        rules.replay_distance = replay_distance
        rules.preempt, rules.reorder = preempt, reorder
        _check(lib.pye_set_prefetch_rules(self._open(), rules))

    def set_look_ahead(self, on: bool) -> None:
        """Whether anything is guessed at all, see pye_set_look_ahead."""
        _check(lib.pye_set_look_ahead(self._open(), on))

    def expect(self, layer: int, experts: Sequence[int], *, keep: bool) -> None:
        """Prefetch experts of a layer, likeliest first, see pye_expect. Raises PyengineError if there is none such."""
        ids = ffi.new("uint32_t[]", list(experts))
        _check(lib.pye_expect(self._open(), layer, ids, len(experts), keep))

    def set_recording(self, *, ids: bool, inputs: bool = False) -> None:
        """Record what routers choose and see, for tokens computed one at a time; see take_recording()."""
        _check(lib.pye_set_recording(self._open(), ids, inputs))

    def take_recording(
        self, n_token: int, info: ModelInfo, *, inputs: bool
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """The oldest tokens that were recorded, up to `n_token`; zero in layers that the model does not compute.

        Returns:
            ids uint16 [n, n_layer, n_expert_used], weights float16 likewise, gate inputs float16 [n, n_layer, n_embd]
            (n_embd is 0 unless `inputs`).
        """
        ids = np.zeros((n_token, info.n_layer, info.n_expert_used), np.uint16)
        weights = np.zeros(ids.shape, np.float16)
        seen = np.zeros((n_token, info.n_layer, info.n_embd if inputs else 0), np.float16)
        pointers = [ffi.from_buffer("uint16_t[]", array, require_writable=True) for array in (ids, weights)]
        pointers.append(ffi.from_buffer("uint16_t[]", seen, require_writable=True) if inputs else ffi.NULL)
        n = lib.pye_take_recording(self._open(), *pointers, n_token)
        return ids[:n], weights[:n], seen[:n]

    def stats(self) -> dict[str, int]:
        """Counters since start(), see pye_stats."""
        raw = ffi.new("pye_stats *")
        _check(lib.pye_get_stats(self._open(), raw))
        return {name: getattr(raw, name) for name, _ in ffi.typeof("pye_stats").fields}

    def events(self, capacity: int = 1 << 16) -> npt.NDArray[np.void]:
        """Take the oldest events, structured array of dtype EVENT."""
        out = np.zeros(capacity, EVENT)
        n = lib.pye_events(self._open(), ffi.cast("pye_event *", ffi.from_buffer(out, require_writable=True)), capacity)
        return out[:n]

    def set_timeline(self, on: bool) -> None:
        """Note from now on when what happens; forgets what was noted before."""
        _check(lib.pye_set_timeline(self._open(), on))

    def take_timeline(self) -> npt.NDArray[np.void]:
        """Take what was noted, structured array of dtype SPAN, see pye_span."""
        out = np.zeros(1 << 16, SPAN)
        n = lib.pye_take_timeline(
            self._open(), ffi.cast("pye_span *", ffi.from_buffer(out, require_writable=True)), len(out)
        )
        return out[:n].copy()

    def take_failure(self) -> Exception | None:
        """The reason why computing has failed since the last call, as the exception to raise, or None."""
        reason = ffi.new("char[1024]")
        code = lib.pye_take_failure(self._open(), reason, len(reason))
        if code == lib.PYE_OK:
            return None
        message = one_line(ffi.string(reason).decode("utf-8", "replace"))
        if code == lib.PYE_E_MEMORY:
            return MemoryError(message)
        if code == lib.PYE_E_FILE:
            return ExpertReadError(message)
        return _ERRORS.get(code, PyengineError)(message)

    def take_notice(self) -> str:
        """What did not fail and yet should be known, once, e.g. a damaged record of the bundle; else empty."""
        lib.pye_take_notice(self._open(), self._notice, len(self._notice))
        return one_line(ffi.string(self._notice).decode("utf-8", "replace")) if self._notice[0] != b"\0" else ""

    def set_replay(self, ids: npt.NDArray[np.int32]) -> None:
        """Expert ids for the following steps in the place of the router's, begun anew after the last; none ends it.
        Layers that lie in VRAM as a whole keep their router's.

        Args:
            ids: int32 [n_step, n_layer, n_expert_used].

        Raises:
            PyengineError: an id or a shape that does not fit the model.
        """
        values = np.ascontiguousarray(ids, dtype=np.int32)
        n_step, _, n_used = values.shape
        _check(lib.pye_set_replay(self._open(), ffi.from_buffer("int32_t[]", values), n_step, n_used))

    def inject_read_errors(self, after: int, n: int) -> None:
        """For tests: after `after` more loads, the next `n` fail."""
        _check(lib.pye_inject_read_errors(self._open(), after, n))

    def close(self) -> None:
        """Free the slots. Close the llama model first: its tensors can no longer compute afterwards."""
        if self._handle is not None:
            lib.pye_close(self._handle)
            self._handle = None

    def _open(self) -> Any:
        if self._handle is None:
            raise UsageError("the model is closed")
        return self._handle
