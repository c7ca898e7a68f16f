"""`pyengine.Llama`: llama_cpp.Llama with its experts in limited memory.

Threads: one thread at a time may compute with a Llama (as with llama_cpp.Llama); a second one gets UsageError instead
of mixed-up text. expert_stats(), engaged and set_ram_budget() may be called from any thread at any time.
Processes: load after forking. A forked child that computes with its parent's Llama gets UsageError.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp
import psutil
from jinja2 import TemplateError
from llama_cpp import _internals
from llama_cpp._logger import set_verbose

from pyengine import startup, vram
from pyengine.adapters import refuse_expert_adapter
from pyengine.advice.foresight import check_wording as check_look_ahead_wording
from pyengine.budget import Budget, check_wording
from pyengine.bundled import bundled_model
from pyengine.bundles import check_wording as check_bundle_wording
from pyengine.engine import ExpertEngine, open_engine
from pyengine.errors import ModelFileError, PyengineError, UsageError, one_line
from pyengine.llama_log import errors_said
from pyengine.one_user import OneUser
from pyengine.planning.vram_needs import Context, Room, room_on
from pyengine.policies import check_wording as check_policy_wording

_log = logging.getLogger("pyengine")

#: The weights that go to our buffer type. Biases and scales of experts stay with llama.cpp and keep the model's ids.
_EXPERT_WEIGHTS = rb"blk\.[0-9]+\.ffn_(gate|up|down|gate_up)_exps\.weight$"

#: GGML_MAX_N_THREADS of ggml.h; more would write past an array there.
_MOST_THREADS = 512

_Result = TypeVar("_Result")


def default_threads() -> int:
    """Cores this process may use; hyper-threads do not help the kernels."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class _BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h, which llama_cpp leaves out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class Llama(llama_cpp.Llama):
    """A drop-in for llama_cpp.Llama that keeps as many experts in RAM as you allow and reads the others when they are
    needed. Same tokens, whatever the budget. Models without experts run as in llama_cpp.

    Args:
        model_path: GGUF file (the first one of a split model); None is the small model that comes with the package.
        ram_budget: "auto" (what the machine can spare), a share of all experts ("50%"), a size ("2GiB") or bytes. With
            a GPU: of the tier behind it, "0" for none.
        vram_budget: the same for slots in the memory of the GPU; of several GPUs for all together, or a list of one
            for each.
        gpu: "auto" is every GPU that this build of llama.cpp finds (unless n_gpu_layers=0 is given), "off" none,
            otherwise ggml's names of devices, e.g. "CUDA0", or "CUDA0,CUDA1", or a list. Layers are divided as in
            llama.cpp: by free memory or tensor_split; split_mode "none" takes main_gpu alone, others are refused.
        hybrid: with a GPU, let the CPU compute some of the experts that are missing in VRAM while others are moved,
            where that is faster. Their rows round as the CPU's kernels do, and which ones depends on measured times;
            without it, the same text gives the same bits every time.
        bundle: "use" reads experts from the model's bundle if there is one that fits (beside the model or in the cache
            folder), "off" never does, a path names one that must fit. See gguf_tools bundle.
        policy: which experts stay in RAM: "auto", or a name in pyengine.policies.POLICIES.
        look_ahead: how to tell which experts come next, so that they are fetched ahead: "auto", "fate" or "off".
        n_sequences: texts at once that share the context's n_ctx KV cells, for pyengine.sessions; at most
            n_batch, which llama_cpp limits to n_ctx.
        **kwargs: everything llama_cpp.Llama takes. Differences: verbose is False and n_threads all cores by default;
            use_mmap and use_mlock do not concern experts; unknown keywords are errors.

    Raises:
        ModelFileError: the file is missing, damaged, or of a kind llama.cpp does not know.
        BudgetError: the budget is not understood or below the least this model needs, or the context has no room beside
            it in VRAM; the message says which one has.
        StaleBundleError: the bundle that was named does not fit.
        StartupError: the installed llama.cpp does not fit this package or this machine.
        ValueError: a number out of its range.
        TypeError: an unknown keyword.
    """

    _engine: ExpertEngine | None = None  # __del__ closes also what __init__ never began

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        ram_budget: Budget = "auto",
        vram_budget: vram.Budgets = "auto",
        gpu: str | Sequence[str] = "auto",
        hybrid: bool = True,
        bundle: str | Path = "use",
        policy: str = "auto",
        look_ahead: str = "auto",
        n_sequences: int = 1,
        **kwargs: Any,
    ) -> None:
        self._engaged = ""
        room: Room | None = None
        self._ram_budget = ram_budget
        self._vram_budget = vram_budget
        self._gpu = gpu
        self._hybrid = hybrid
        self._bundle = bundle
        self._policy = policy
        self._look_ahead = look_ahead
        self._n_sequences = n_sequences
        self._user = OneUser()
        self.observers: list[Callable[[], None]] = []  # called after each computation, on its thread
        self._params: Any = None
        startup.check()
        _refuse_unknown(kwargs)
        check_wording(ram_budget)
        check_bundle_wording(bundle)
        check_policy_wording(policy)
        check_look_ahead_wording(look_ahead)
        path = Path(bundled_model() if model_path is None else model_path)
        kwargs.setdefault("verbose", False)
        set_verbose(kwargs["verbose"])  # opening a bundle repacks a pattern, and ggml talks about it
        kwargs["n_threads"] = kwargs.get("n_threads") or default_threads()
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or default_threads()
        if max(kwargs["n_threads"], kwargs["n_threads_batch"]) > _MOST_THREADS:
            raise ValueError(f"n_threads and n_threads_batch must be at most {_MOST_THREADS}")
        if not 1 <= n_sequences <= llama_cpp.llama_max_parallel_sequences():
            raise ValueError(f"n_sequences must be 1 to {llama_cpp.llama_max_parallel_sequences()}")
        if kwargs.get("vocab_only"):
            self._engaged = "vocabulary only"
        else:
            with _reasons():
                chosen = vram.choose(
                    "off" if kwargs.get("n_gpu_layers") == 0 else gpu,
                    vram_budget,
                    ram_budget,
                    _split(kwargs),
                    host_threads=_host_threads(kwargs["n_threads"]) if hybrid else 0,
                )
                if chosen is not None and (room := room_on(path, chosen, _context(kwargs, n_sequences))) is not None:
                    room.check()
                with _tight(room):
                    self._engine = open_engine(
                        path,
                        ram_budget,
                        bundle,
                        self._note_stock,
                        policy,
                        look_ahead,
                        chosen,
                        kwargs.get("kv_overrides") or {},
                    )
        try:
            if self._engine is not None:
                if kwargs.get("lora_path"):
                    refuse_expert_adapter(Path(kwargs["lora_path"]))
                if chosen is not None:
                    kwargs.setdefault("n_gpu_layers", -1)
                elif kwargs.get("n_gpu_layers"):
                    _log.warning("n_gpu_layers: experts stay in RAM slots; only the other weights can go to a GPU")
                if kwargs.get("use_mlock"):
                    _log.warning("use_mlock: not done; experts come and go, and the other weights stay unlocked")
                self._overrides = self._buffer_overrides(self._engine)
                self._devices = (ctypes.c_void_p * (len(self._engine.gpu_devices) + 1))(*self._engine.gpu_devices)
                self._shares = (ctypes.c_float * llama_cpp.LLAMA_MAX_DEVICES)(*self._engine.gpu_shares)
            with _tight(room):
                self._load(path, kwargs)
            if self._engine is not None:
                self._guard_decoding()
                self._engine.settle()
                if room is not None and (shortage := room.shortage(self._engine.stats()["slots"])):
                    _log.warning("%s", shortage)
            as_asked = self._engine is not None or kwargs.get("vocab_only")
            _log.log(logging.INFO if as_asked else logging.WARNING, "%s", self.engaged)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, kwargs: dict[str, Any]) -> None:
        with _reasons():
            try:
                super().__init__(str(path), **kwargs)
            except ValueError as error:
                reason = self._engine.explain(error) if self._engine is not None else error
                if reason is not error:
                    raise reason from error
                if "Failed to load model" in str(error) or "does not exist" in str(error):
                    raise ModelFileError(str(error)) from error
                raise
            except TemplateError as error:
                raise ModelFileError(f"{path}: the chat template in it is damaged: {one_line(str(error))}") from error

    def _note_stock(self, reason: str) -> None:
        self._engaged = f"no experts managed, stock llama.cpp: {reason}"

    # ---- what the base class loads with. It builds and consumes model_params inside __init__, so our fields are
    # applied every time it looks; those of context_params when it begins with the defaults.

    @property
    def model_params(self) -> Any:
        if self._params is not None and self._engine is not None:
            self._params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
            if self._devices[0]:
                self._params.devices = ctypes.cast(self._devices, ctypes.c_void_p)  # a null ends it
                # What was chosen, and by which the engine has divided the experts.
                self._params.split_mode, self._params.main_gpu = llama_cpp.LLAMA_SPLIT_MODE_LAYER, 0
                self._params.tensor_split = self._shares
            # mmap would populate the whole file; buffered reading would pull experts into the page cache.
            self._params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        return self._params

    @model_params.setter
    def model_params(self, value: Any) -> None:
        self._params = value

    @property
    def context_params(self) -> Any:
        return self._context

    @context_params.setter
    def context_params(self, value: Any) -> None:
        value.n_seq_max = self._n_sequences
        value.kv_unified = self._n_sequences > 1  # else each has but its share of n_ctx, and no cell is shared
        self._context = value

    @property
    def n_batch(self) -> int:
        """Most tokens of one call into llama.cpp."""
        return self._n_batch

    @n_batch.setter
    def n_batch(self, value: int) -> None:
        # llama.cpp reserves an output for each sequence, and ends the process if a batch has fewer. 0: not known yet,
        # because n_ctx is to be the model's own.
        if 0 < value < self._n_sequences:
            raise ValueError(
                f"n_sequences={self._n_sequences} needs n_batch and n_ctx of at least {self._n_sequences}, and the "
                f"smaller one is {value}"
            )
        self._n_batch = value

    @staticmethod
    def _buffer_overrides(engine: ExpertEngine) -> Any:
        array = (_BufferOverride * 2)()  # the second one ends the list
        array[0].pattern = _EXPERT_WEIGHTS
        array[0].buft = engine.buffer_type
        return array

    # ---- computing

    def _guard_decoding(self) -> None:
        """Every computation goes through the context's decode and encode: name the reason when one fails."""
        context: _internals.LlamaContext = self._ctx
        context.decode = self._guarded(context.decode)  # type: ignore[assignment, method-assign]
        context.encode = self._guarded(context.encode)  # type: ignore[assignment, method-assign]

    def _guarded(self, compute: Callable[[Any], _Result]) -> Callable[[Any], _Result]:
        engine, user = self._engine, self._user
        assert engine is not None

        def guarded(batch: Any) -> _Result:
            engine.check_process()
            with user.computing():
                try:
                    engine.foresee(batch.batch.token[: batch.batch.n_tokens] if batch.batch.token else ())
                    self._requires_eval = True  # also of the later parts of a long prompt, see eval()
                    with errors_said():  # the reason follows as an exception
                        result = compute(batch)
                    engine.say_notice()
                    engine.routing_log.drain()
                    for look in self.observers:
                        look()
                    return result
                except RuntimeError as error:
                    reason = engine.explain(error)
                    if reason is error:
                        raise
                    raise reason from error

        return guarded

    # llama_cpp.Llama changes its own state before and after it decodes: these refuse a second thread before that.

    def eval(self, tokens: Sequence[int]) -> None:
        """As in llama_cpp.Llama."""
        self._check_process()
        with self._user.computing():
            if len(tokens) > 0:
                # Interrupted after llama.cpp has computed and before llama_cpp has counted the tokens, the logits would
                # be taken for those of the tokens before, and the next answer to the prompt begin with a wrong one.
                self._requires_eval = True
            super().eval(tokens)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in llama_cpp.Llama."""
        with self._user.computing():  # close() waits for it
            token: int = super().sample(*args, **kwargs)
            return token

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As in llama_cpp.Llama."""
        self._check_process()
        steps = super().generate(*args, **kwargs)
        more: Sequence[int] | None = None
        try:
            while True:
                with self._user.computing(steps):
                    try:
                        token = steps.send(more)
                    except StopIteration:
                        return
                more = yield token
        finally:
            self._user.finished(steps)

    def _check_process(self) -> None:
        if self._engine is not None:
            self._engine.check_process()

    # ---- what this class adds

    @property
    def engaged(self) -> str:
        """One plain line: what is kept where, or why nothing is."""
        return self._engine.engaged if self._engine is not None else self._engaged

    def expert_stats(self) -> dict[str, Any]:
        """Counters since loading.

        Returns:
            managed (bool; all else is 0 or None if False), hits, misses (one per distinct expert, layer and step),
            hit_rate (None before the first access), prefetches, prefetch_hits (of the hits: fetched ahead, first use),
            prefetches_late (of the misses: still under way), prefetches_wasted (given up, or evicted unused),
            prefetches_failed, guesses (about absent experts), guesses_right, predict_seconds, evictions, bytes_read,
            reads, read_errors, stall_seconds (kernels waiting for experts), compute_seconds (in expert kernels),
            load_seconds (summed over I/O threads), io_seconds (with at least one load under way), expert_ffns, passes,
            resident (experts now), resident_bytes, slots, budget_bytes, bundle (the path in use or None), experts,
            expert_bytes, least_budget, layers; gpu (name or None; slots are in its memory; several: with commas), gpus
            (a dict for each: name, n_layer, slots, resident, budget_bytes, least_budget, slot_bytes, ffns), link_bytes
            (moved to them),
            link_seconds (summed over threads), syncs (waits for the GPU), begun_ahead (pieces of graphs, before it was
            known whether their experts are there), computed_again (of those: one was not), ram_hits (loads served by
            the RAM tier), ram_resident, ram_slots, ram_budget_bytes, ram_demotions (experts copied back from VRAM),
            back_bytes (by that), ram_fills (experts read ahead), host_pairs (token and rank of experts that the CPU
            computed from RAM), host_seconds (in that), link_bytes_per_s (measured of late, while anything moved).
        """
        return self._engine.stats() if self._engine is not None else dict(_NO_STATS)

    def set_ram_budget(self, ram_budget: Budget) -> None:
        """Change the budget now, also while another thread computes; with a GPU that of the tier behind it, which is
        empty then, until it is read ahead again. For a model without managed experts there is nothing to change. Raises
        BudgetError; with a GPU MemoryError if RAM has not so much, UsageError if the GPU's memory is RAM."""
        check_wording(ram_budget)
        if self._engine is not None:
            self._engine.set_ram_budget(ram_budget)
        self._ram_budget = ram_budget

    def set_vram_budget(self, vram_budget: vram.Budgets) -> None:
        """Change the slots in VRAM now, also while another thread computes. Raises BudgetError, MemoryError; UsageError
        if no GPU is in use."""
        vram.check_budgets(vram_budget)
        if self._engine is not None:
            self._engine.set_vram_budget(vram_budget)
        self._vram_budget = vram_budget

    @property
    def engine(self) -> ExpertEngine | None:
        """The engine behind this model; None if stock llama.cpp runs it alone."""
        return self._engine

    def close(self) -> None:
        """Free the model, then its experts. Waits for a computation that another thread has begun. Afterwards every use
        raises UsageError; closing again does nothing."""
        if hasattr(self, "_stack"):
            # First no new use can begin, then those end that have: llama_cpp would follow pointers to what is freed.
            for name in ("_model", "_ctx", "_batch", "tokenizer_"):
                setattr(self, name, _Closed())
            self._user.wait_until_idle()
            if self._engine is not None:
                with contextlib.suppress(UsageError):  # a forked child: its parent tells
                    self._engine.check_process()
                    self._engine.routing_log.flush()
            super().close()
        if self._engine is not None:
            self._engine.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["ram_budget"] = self._ram_budget
        state["vram_budget"] = self._vram_budget
        state["gpu"] = self._gpu
        state["hybrid"] = self._hybrid
        state["bundle"] = self._bundle
        state["policy"] = self._policy
        state["look_ahead"] = self._look_ahead
        state["n_sequences"] = self._n_sequences
        return state


#: The name of the logging function, and what every line about loading begins with.
_LOG_PREFIX = re.compile(r"^\w+: (error loading model: )?")


class _Closed:
    """Stands where llama.cpp's objects were."""

    def __getattr__(self, name: str) -> Any:
        raise UsageError("this Llama is closed")


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Let a ModelFileError, or llama_cpp's own ValueError, also say the reason, which llama.cpp logs first, before it
    says that it gives up."""
    with errors_said() as said:
        try:
            yield
        except ValueError as error:
            if not said or type(error) not in (ModelFileError, ValueError):
                raise
            raise type(error)(f"{error}: {_LOG_PREFIX.sub('', said[0])}") from error


@contextlib.contextmanager
def _tight(room: Room | None) -> Iterator[None]:
    """Of a failure for want of memory llama.cpp says only that it failed; if there was hardly enough, say how much."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        ours = isinstance(error, PyengineError) and not isinstance(error, ModelFileError)
        if ours or room is None or not room.tight:
            raise
        raise room.error() from error


def _context(kwargs: dict[str, Any], n_sequences: int) -> Context:
    """What llama_cpp.Llama was told about the context."""
    names = ("n_ctx", "n_batch", "n_ubatch", "flash_attn", "offload_kqv", "swa_full", "type_k", "type_v")
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    return Context(n_sequences=n_sequences, **given)


def _split(kwargs: dict[str, Any]) -> vram.Split:
    """What llama_cpp.Llama was told about several GPUs."""
    named = {"mode": "split_mode", "main_gpu": "main_gpu", "shares": "tensor_split", "n_gpu_layers": "n_gpu_layers"}
    return vram.Split(**{ours: kwargs[theirs] for ours, theirs in named.items() if theirs in kwargs})


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    known = set(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"self", "model_path", "kwargs"}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"Llama() got an unexpected keyword argument {name!r}")


def _host_threads(n_threads: int) -> int:
    """Of so many threads those that compute experts beside a GPU. Others start the GPU's work and move experts. On 16
    processors an expert of 13 MB took 0.46 ms with 8 threads and 2 ms if these had slept; with 12, 11 ms then."""
    return max(1, n_threads // 2)


_NO_STATS: dict[str, Any] = {
    "managed": False,
    "hit_rate": None,
    "bundle": None,
    "gpu": None,
    "gpus": (),
    **dict.fromkeys(
        (
            "hits misses prefetches prefetch_hits prefetches_late prefetches_wasted prefetches_failed guesses "
            "guesses_right predict_seconds evictions bytes_read reads read_errors stall_seconds compute_seconds "
            "load_seconds io_seconds "
            "expert_ffns passes resident resident_bytes slots budget_bytes experts expert_bytes least_budget layers "
            "link_bytes link_seconds syncs begun_ahead computed_again ram_hits ram_resident ram_slots ram_budget_bytes "
            "ram_demotions ram_fills back_bytes host_pairs host_seconds link_bytes_per_s"
        ).split(),
        0,
    ),
}
