"""One sample: load one model one way, measure, print one line of JSON. Run by launch.py as `python -m
pyengine.bench.child`.

Reads its task as JSON from standard input (Task). What it prints is the result of measuring.measure() plus load_s,
peak_rss and what engaged, or {"status": "unsupported", "reason": ...}. pyengine itself is imported for pyengine's rows
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.bench.gpu_placement import cpu_layers, load_stock, one_layer
from pyengine.bench.measuring import Texts, measure
from pyengine.bench.process_counters import peak_resident, process_counters
from pyengine.bench.replay_trace import TraceTexts
from pyengine.bench.rows import ACTIVATION_PATH, ADVICE, LEARNED, STOCK_MMAP_PLAIN, STOCK_RESIDENT, Advice
from pyengine.bench.texts import long_text, short_prompts, stretch

PR_SET_PDEATHSIG = 1
_COUNTERS = (
    *("hits", "misses", "bytes_read", "reads", "passes", "evictions"),
    *("prefetches", "prefetch_hits", "prefetches_late", "prefetches_wasted", "link_bytes"),
)

#: Layers that simulated guesses look ahead: ProMoE's stride. One layer hides too little of a large expert.
REPLAY_DISTANCE = 2


@dataclass(frozen=True)
class Task:
    """What a child is to do: a row (see rows.Row) and how to measure (see settings.Settings). bundle: its file, or
    "off"."""

    model: str
    kind: str
    budget: int
    bundle: str
    n_tokens: int
    n_prompts: int
    prefill_tokens: int
    limit_s: float
    n_threads: int
    trace: str | None = None
    recall: float | None = None
    gpu: str | None = None
    share: float | None = None
    n_layer: int = 0


class UnsupportedError(Exception):
    """This row cannot be run here; the message says why."""


class LoadedModel:
    """A llama_cpp.Llama, stock or ours, as measuring.Subject."""

    def __init__(self, llm: Any, replay: TraceTexts | None) -> None:
        self._llm = llm
        self._native = llm.engine.native if getattr(llm, "engine", None) is not None else None
        self._replay = replay

    def begin(self, text: int, tokens: int) -> None:
        self._llm.reset()
        if self._replay is not None and self._native is not None:
            self._native.set_replay(self._replay.ids(text, tokens))

    def eval(self, tokens: Sequence[int]) -> None:
        self._llm.eval(tokens)

    def likeliest(self) -> int:
        import numpy as np

        logits = np.ctypeslib.as_array(self._llm._ctx.get_logits(), shape=(self._llm.n_vocab(),))
        return int(logits.argmax())

    def counters(self) -> Mapping[str, float]:
        counts: dict[str, float] = dict(process_counters())
        if self._native is not None:
            raw = self._native.stats()
            counts |= {name: raw[name] for name in _COUNTERS}
            counts |= {
                name.removesuffix("_ns") + "_s": raw[name] / 1e9
                for name in ("stall_ns", "compute_ns", "load_ns", "io_ns", "predict_ns")
                if name in raw
            }
        return counts


@contextlib.contextmanager
def without_profiles() -> Iterator[None]:
    """A cache folder with all that the user's has but profiles: no sample begins with what another one learned, and
    none leaves anything to the user's own runs."""
    from pyengine.cache import cache_dir

    kept, before = cache_dir(), os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="pyengine-bench-") as fresh:
        os.environ["XDG_CACHE_HOME"] = fresh
        cache_dir().mkdir()
        for entry in kept.glob("*"):
            if entry.name != "profiles":
                (cache_dir() / entry.name).symlink_to(entry)
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def load(task: Task, n_ctx: int) -> Any:
    """The model, loaded as the row says. Raises UnsupportedError."""
    common: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": 512,
        "n_threads": task.n_threads,
        "n_threads_batch": task.n_threads,
        "verbose": False,
    }
    if task.gpu is not None and task.kind.startswith("stock"):
        return load_stock(task.model, task.gpu, cpu_layers(task.n_layer, task.share), **common)
    if task.kind.startswith("stock"):
        stock = _PlainLlama() if task.kind == STOCK_MMAP_PLAIN else _imported("llama_cpp")
        return stock(task.model, use_mmap=task.kind != STOCK_RESIDENT, **common)
    advice = ADVICE[task.kind]
    where: dict[str, Any] = {"gpu": "off", "ram_budget": advice.ram_budget or task.budget, "bundle": task.bundle}
    if task.gpu is not None:
        vram = one_layer(task.model, task.gpu) if task.share is None else f"{task.share:g}%"
        where = {"gpu": task.gpu, "vram_budget": vram, "ram_budget": "100%", "bundle": "off"}
    llm = _imported("pyengine")(
        task.model,
        **where,
        policy=advice.policy,
        look_ahead=advice.look_ahead,
        **common,
    )
    try:
        _apply(task, advice, llm.engine, llm.engaged)
    except BaseException:
        llm.close()
        raise
    return llm


def _apply(task: Task, advice: Advice, engine: Any, engaged: str) -> None:
    """What pyengine.Llama has no argument for. Raises UnsupportedError."""
    if engine is None:
        raise UnsupportedError(engaged)
    if task.kind == LEARNED and task.trace is None and engine.foresight == "fate":
        raise UnsupportedError("no predictors are learned for this model; pyengine learn-predictor makes them")
    rules: dict[str, Any] = dict(advice.rules)
    if task.trace and task.recall is not None and advice.look_ahead != "off":
        rules |= {"replay_recall": task.recall, "replay_distance": REPLAY_DISTANCE}
    if rules:
        engine.native.set_prefetch_rules(**rules)
    if task.kind == ACTIVATION_PATH:
        from pyengine.bench.activation_path import PathPrefetcher

        PathPrefetcher(engine.native, engine.info, engine.routing_log)


def _imported(package: str) -> Any:
    import importlib

    return importlib.import_module(package).Llama


def _PlainLlama() -> Any:  # noqa: N802  (it returns a class)
    """llama_cpp.Llama with a parameter that it leaves out: no repacking, so weights stay pages of the file."""
    import llama_cpp

    class PlainLlama(llama_cpp.Llama):
        # The base class builds and uses this in its __init__; the field is set as soon as it is there.
        @property
        def model_params(self) -> Any:
            return self._params

        @model_params.setter
        def model_params(self, value: Any) -> None:
            value.use_extra_bufts = False
            self._params = value

    return PlainLlama


def texts_of(llm: Any, task: Task) -> Texts:
    """The prompts and the prefill text as token ids of this model."""
    prompts = [llm.tokenize(text.encode()) for text in short_prompts()[: task.n_prompts]]
    long = llm.tokenize(long_text().encode())
    return Texts(prompts, stretch(long, task.prefill_tokens))


def n_ctx_of(task: Task) -> int:
    """Tokens of context that the texts need."""
    # 64: room for the longest of the short prompts. A multiple of 256, see CONTEXT_STEP in cli/options.py.
    return -(-(max(task.prefill_tokens, 64 + task.n_tokens) + 1) // 256) * 256


def run(task: Task) -> dict[str, Any]:
    """Load and measure. Raises UnsupportedError, and whatever llama_cpp and pyengine raise."""
    replay = TraceTexts(Path(task.trace), task.n_prompts) if task.trace else None
    _imported(
        "llama_cpp" if task.kind.startswith("stock") else "pyengine"
    )  # its libraries are not the model's load time
    started = time.perf_counter()
    llm = load(task, n_ctx_of(task))
    load_s = time.perf_counter() - started
    try:
        subject = LoadedModel(llm, replay)
        texts = replay.texts(task.prefill_tokens, llm.n_vocab()) if replay else texts_of(llm, task)
        result = measure(
            subject, texts, task.n_tokens, task.limit_s, lambda name: print(name, file=sys.stderr, flush=True)
        )
        return {
            "status": "ok",
            "load_s": load_s,
            "engaged": getattr(llm, "engaged", "stock llama.cpp"),
            "peak_rss": peak_resident(),
            "libraries": loaded_libraries(),
            **result,
        }
    finally:
        llm.close()


def loaded_libraries() -> list[str]:
    """Names of the native libraries of ours in this process: none in a stock row."""
    with open("/proc/self/maps") as maps:
        return sorted({os.path.basename(line.split()[-1]) for line in maps if "libpyengine" in line})


def main() -> None:
    """Measure as standard input says."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing of a benchmark outlives it
    task = Task(**json.load(sys.stdin))
    try:
        with without_profiles():
            result = run(task)
    except UnsupportedError as reason:
        result = {"status": "unsupported", "reason": str(reason)}
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
