"""The experts of one loaded model: the native engine, its budget, and what to tell people about it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyengine import vram
from pyengine.advice import foresight
from pyengine.advice.auto import AutoPolicy
from pyengine.advice.first_layer import FirstLayer
from pyengine.advice.keeper import Keeper
from pyengine.advice.trial import LookAheadTrial
from pyengine.architectures import MANAGED
from pyengine.budget import Budget, resolve
from pyengine.bundles import use_bundle
from pyengine.errors import UnmanagedModelError, UsageError
from pyengine.native import ModelInfo, NativeEngine
from pyengine.overrides import apply_overrides
from pyengine.policies import check_wording as check_policy
from pyengine.policies import learned_for
from pyengine.pressure import PressureWatch
from pyengine.traces.routing_log import RoutingLog

_log = logging.getLogger("pyengine")

#: On a GPU a token takes a few milliseconds, and advice for each nearly half of one; seconds.
_PAUSE_ON_GPU = 0.02

_PREFETCH_COUNTERS = (
    *("prefetches", "prefetch_hits", "prefetches_late", "prefetches_wasted", "prefetches_failed"),
    *("guesses", "guesses_right"),
)


class ExpertEngine:
    """Keeps the experts of one model within a budget of slots: in RAM over the disk, or in VRAM over RAM over the disk.

    Life: construct -> llama.cpp loads the model with `buffer_type` -> settle() -> compute -> close(), after the model.

    Args:
        path: GGUF file, the first one of a split model.
        ram_budget: see pyengine.budget.resolve.
        bundle: see pyengine.bundles.use_bundle.
        policy: see pyengine.policies.
        look_ahead: see pyengine.advice.foresight.
        gpu: where experts compute, with the budgets; None is the CPU.
        overrides: what llama.cpp is told in the place of the model's metadata, GGUF key -> value.

    Raises:
        ModelFileError, StaleBundleError, BudgetError, MemoryError.
        ValueError: an override that cannot be.
        UnmanagedModelError: the model has no experts, or an architecture or layout that is not managed.
    """

    def __init__(
        self,
        path: Path,
        ram_budget: Budget,
        bundle: str | Path = "use",
        policy: str = "auto",
        look_ahead: str = "auto",
        gpu: vram.Gpus | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        check_policy(policy)
        foresight.check_wording(look_ahead)
        self._path = path
        self._policy, self._look_ahead = policy, look_ahead
        self._foresight = "off"
        self._auto: AutoPolicy | None = None
        self._first_layer: FirstLayer | None = None
        self._owner = os.getpid()
        self._wanted = ram_budget
        self._gpu = gpu
        self._watches: list[PressureWatch] = []
        self._advising = threading.Lock()
        self._not_advised = [ExpertEngine._begin_policy, ExpertEngine._begin_looking_ahead]
        self._native = NativeEngine(path)
        try:
            info = self._native.info
            if info.architecture not in MANAGED:
                raise UnmanagedModelError(
                    f"architecture {info.architecture!r} is not managed (yet); its experts stay with stock llama.cpp"
                )
            self._experts_used = apply_overrides(self._native, overrides or {})
            info = self._native.info
            self._learned = learned_for(policy, path, info)
            if gpu is not None:
                # A bundle's records are in the CPU's layout, as a rule; "use" is for those that fit.
                self._bundle = None if bundle == "use" else use_bundle(self._native, path, bundle)
                vram.start(self._native, gpu)
            else:
                self._bundle = use_bundle(self._native, path, bundle)
                # "auto" is settled when the rest of the model has taken its memory.
                self._native.start(
                    info.least_budget
                    if ram_budget == "auto"
                    else resolve(ram_budget, slot_bytes=info.slot_bytes, least=info.least_budget)
                )
            self._info = self._native.info
            self.routing_log = RoutingLog(self._native, 0.0 if gpu is None else _PAUSE_ON_GPU)
        except BaseException:
            self._native.close()
            raise

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def buffer_type(self) -> int:
        """Address of the ggml_backend_buffer_type that takes this model's expert tensors."""
        return self._native.buffer_type

    @property
    def gpu_devices(self) -> list[int]:
        """Addresses of the ggml_backend_devices that llama.cpp must compute on; none: its own choice."""
        return self._native.gpu_devices

    @property
    def gpu_shares(self) -> tuple[float, ...]:
        """What llama.cpp must be told as tensor_split, one for each of these devices."""
        return () if self._gpu is None else self._gpu.shares

    def settle(self) -> None:
        """Call once the model and its context are loaded: "auto" takes its memory, the pressure watch begins."""
        if self._gpu is not None:
            vram.settle(self._native, self._gpu)
            self._budget_changed()
            self._watch(vram.watches(self._native, self._budget_changed))
            return
        wanted = self._resolve(self._wanted)
        self._native.set_ram_budget(wanted)
        self._budget_changed()
        self._watch([PressureWatch(wanted, self._info.least_budget, self._apply, changed=self._budget_changed)])

    def _watch(self, watches: list[PressureWatch]) -> None:
        """These instead of those before."""
        for watch in self._watches:
            watch.stop()
        self._watches = watches
        for watch in watches:
            watch.start()

    def _budget_changed(self) -> None:
        """Policy and predictors, from the first time on that not every expert has its slot: until then there is nothing
        to choose. On a GPU all are loaded while all have one, for it need not ask for ids then."""
        if self._native.stats()["slots"] >= self._info.n_experts_total:
            if self._gpu is not None:
                vram.fill(self._native, self._info)
            return
        if self._gpu is not None:
            self._native.fill_ram()
        self._advise()

    def _advise(self) -> None:
        """Once, though the watches of several GPUs and the user come here at the same time. What fails is left to the
        next change of the budget."""
        with self._advising:
            while self._not_advised:
                with self.routing_log.all_or_none():
                    self._not_advised[0](self)
                del self._not_advised[0]

    def _begin_policy(self) -> None:
        if self._policy == "auto":
            self._auto = AutoPolicy(
                self._native, self._info, self.routing_log, self._path, self._learned, self._experts_used
            )
        elif self._policy != "lru":  # the engine's own
            Keeper(self._native, self._info, self.routing_log, self._policy, self._learned)

    def _begin_looking_ahead(self) -> None:
        self._foresight = foresight.look_ahead(self._native, self._info, self._path, self._look_ahead)
        if self._look_ahead != "off":
            profile = None if self._auto is None else self._auto.profile
            known = None if profile is None else profile.first_layer
            self._first_layer = FirstLayer(self._native, self._info, self.routing_log, known)
            if self._auto is not None:
                self._auto.first_layer = self._first_layer
        if self._look_ahead == "auto" and self._gpu is None:  # it goes by the time of single tokens
            LookAheadTrial(self._native, self.routing_log)

    def foresee(self, tokens: Sequence[int]) -> None:
        """These token ids are computed next, together: what their first layer may need is fetched."""
        if self._first_layer is not None:
            self._first_layer.before(tokens)

    @property
    def foresight(self) -> str:
        """What experts are guessed with: "learned", "fate" or "off"."""
        return self._foresight

    @property
    def policy(self) -> str:
        """The cache policy in use; of "auto", what it has chosen."""
        return self._policy if self._auto is None else self._auto.policy

    def set_vram_budget(self, vram_budget: vram.Budgets) -> None:
        """Change it while the model runs. Raises BudgetError, MemoryError; UsageError without a GPU."""
        self.check_process()
        if self._gpu is None:
            raise UsageError("no GPU is in use: experts are in RAM")
        gpu = replace(self._gpu, vram_budgets=vram.check_budgets(vram_budget, len(self._gpu.devices)))
        self._watch([])
        try:
            vram.settle(self._native, gpu)
            self._gpu = gpu
        finally:
            self._watch(vram.watches(self._native, self._budget_changed))
        self._budget_changed()

    def set_ram_budget(self, ram_budget: Budget) -> None:
        """Change the budget while the model runs; with a GPU that of the tier behind it. Raises BudgetError; with a GPU
        MemoryError if RAM has not so much, UsageError if the GPU's memory is RAM."""
        self.check_process()
        if self._gpu is not None:
            gpu = replace(self._gpu, ram_budget=ram_budget)
            vram.set_ram_tier(self._native, gpu)
            self._gpu = gpu
            return
        wanted = self._resolve(ram_budget)
        if not self._watches:
            self._apply(wanted)
        for watch in self._watches:
            watch.set_wanted(wanted)
        self._wanted = ram_budget
        self._budget_changed()

    def _apply(self, budget: int) -> int:
        """A new budget, bytes; slots that it adds are filled before somebody needs what they will hold. Returns what is
        in force, not rounded to slots: what was asked for."""
        grows = budget > self._native.stats()["budget_bytes"]
        self._native.set_ram_budget(budget)
        if grows and self._auto is not None:
            self._auto.refill()
        return budget

    def _resolve(self, ram_budget: Budget) -> int:
        from pyengine.budget import available_memory

        # What our slots hold already is ours to keep.
        mine = self._native.stats()["resident_bytes"]
        return resolve(
            ram_budget,
            slot_bytes=self._info.slot_bytes,
            least=self._info.least_budget,
            available=available_memory() + mine,
        )

    @property
    def engaged(self) -> str:
        """One plain line: what is kept where, and how it computes."""
        info, stats = self._info, self._native.stats()
        per_layer = stats["slots"] / info.n_layer
        kept = f"{per_layer:.0f}" if per_layer == int(per_layer) else f"{per_layer:.1f}"
        if self._gpu is not None:
            return (
                f"{info.n_layer} layers x {kept} of {info.n_expert} experts ({stats['budget_bytes'] / 2**20:.1f} MiB) "
                f"in {vram.places(self._native.gpus())} over {stats['ram_slots'] / info.n_layer:.1f} "
                f"({stats['ram_budget_bytes'] / 2**20:.1f} MiB) in RAM over disk, {info.kernels}, "
                f"{'direct' if info.direct_io else 'buffered'} I/O"
            )
        return (
            f"{info.n_layer} layers x {kept} of {info.n_expert} experts ({stats['budget_bytes'] / 2**20:.1f} MiB) in "
            f"RAM over {'disk' if self._bundle is None else 'bundle ' + self._bundle.name}, {info.kernels}, "
            f"{'direct' if info.direct_io else 'buffered'} I/O"
        )

    def stats(self) -> dict[str, Any]:
        """Counters since loading, see Llama.expert_stats."""
        raw = self._native.stats()
        seen = raw["hits"] + raw["misses"]
        return {
            "managed": True,
            "hits": raw["hits"],
            "misses": raw["misses"],
            "hit_rate": raw["hits"] / seen if seen else None,
            "evictions": raw["evictions"],
            "bytes_read": raw["bytes_read"],
            "reads": raw["reads"],
            "read_errors": raw["read_errors"],
            **{name: raw[name] for name in _PREFETCH_COUNTERS},
            "predict_seconds": raw["predict_ns"] / 1e9,
            "stall_seconds": raw["stall_ns"] / 1e9,
            "compute_seconds": raw["compute_ns"] / 1e9,
            "load_seconds": raw["load_ns"] / 1e9,
            "io_seconds": raw["io_ns"] / 1e9,
            "gpu": None if self._gpu is None else self._gpu.name,
            "gpus": tuple(asdict(part) for part in self._native.gpus()),
            "link_bytes": raw["link_bytes"],
            "link_seconds": raw["link_ns"] / 1e9,
            **{
                name: raw[name]
                for name in (
                    "syncs",
                    "begun_ahead",
                    "computed_again",
                    "ram_hits",
                    "ram_resident",
                    "ram_slots",
                    "ram_budget_bytes",
                    "ram_demotions",
                    "ram_fills",
                    "back_bytes",
                    "host_pairs",
                    "link_bytes_per_s",
                )
            },
            "host_seconds": raw["host_ns"] / 1e9,
            "expert_ffns": raw["steps_layers"],
            "passes": raw["passes"],
            "resident": raw["resident"],
            "resident_bytes": raw["resident_bytes"],
            "slots": raw["slots"],
            "budget_bytes": raw["budget_bytes"],
            "experts": self._info.n_experts_total,
            "expert_bytes": self._info.expert_bytes,
            "least_budget": self._info.least_budget,
            "layers": self._info.n_layer,
            "bundle": None if self._bundle is None else str(self._bundle),
        }

    @property
    def host_threads(self) -> int:
        """Threads that compute experts beside a GPU; 0: none do."""
        return 0 if self._gpu is None else self._gpu.host_threads

    @property
    def native(self) -> NativeEngine:
        """The engine itself, for tools that read events or set priorities."""
        return self._native

    def say_notice(self) -> None:
        """Log what did not fail and yet should be known, if there is anything."""
        notice = self._native.take_notice()
        if notice:
            _log.warning("%s", notice)

    def explain(self, error: Exception) -> Exception:
        """The reason behind a failure that llama.cpp reports only as a number, else `error` itself."""
        with contextlib.suppress(UsageError):
            return self._native.take_failure() or error
        return error

    def check_process(self) -> None:
        """Raise UsageError in a forked child: it has no I/O threads, and its parent's memory is not its own."""
        if os.getpid() != self._owner:
            raise UsageError("this process was forked after the model was loaded; load the model in the child instead")

    def close(self) -> None:
        """Stop watching and free the slots. Harmless when repeated, and in a forked child."""
        if os.getpid() == self._owner:
            self._watch([])
        self._watches = []
        if self._auto is not None:
            self._auto.close()
        self._auto = None
        self._native.close()


def open_engine(
    path: Path,
    ram_budget: Budget,
    bundle: str | Path,
    say: Callable[[str], None],
    policy: str = "auto",
    look_ahead: str = "auto",
    gpu: vram.Gpus | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ExpertEngine | None:
    """An engine for the model, or None, with one plain line said, if stock llama.cpp must run it alone."""
    try:
        return ExpertEngine(path, ram_budget, bundle, policy, look_ahead, gpu, overrides)
    except UnmanagedModelError as reason:
        say(f"{path.name}: {reason}")
        return None
