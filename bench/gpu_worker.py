"""One row of gpu_tiers.py, in a process of its own: loads the model, computes, prints one line of JSON.

Rows: `stock` keeps all experts in VRAM, `static:N` those of the first N layers on the CPU (llama.cpp's -ncmoe N),
`pyengine:B` is ours with B percent of the expert bytes in VRAM, and `pyengine:B:POLICY:LOOK` names cache policy and
look-ahead.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

#: Tokens whose logits are compared, computed one by one from an empty context.
EXACT_TOKENS = 12
#: Then so many at once, of which the last one's are.
EXACT_PROMPT = 200


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class Stock(llama_cpp.Llama):
    """llama_cpp.Llama with the experts of some layers on the CPU, as llama.cpp's own programs can place them."""

    def __init__(self, path: str, layers_on_cpu: int, gpus: list[str], **kwargs: Any) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        lib = ctypes.CDLL(str(folder / "libggml-base.so"))
        lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        registry = ctypes.CDLL(str(folder / "libggml.so"))
        registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        llama_cpp.llama_backend_init()
        self._devices = (ctypes.c_void_p * (len(gpus) + 1))(  # a null ends the list
            *[registry.ggml_backend_dev_by_name(name.encode()) for name in gpus]
        )
        self._given: Any = None
        self._array = (_Override * 2)()
        if layers_on_cpu > 0:
            which = "|".join(str(i) for i in range(layers_on_cpu))
            self._array[0].pattern = rf"blk\.({which})\.ffn_(up|down|gate|gate_up)_exps\.weight".encode()
            self._array[0].buft = lib.ggml_backend_cpu_buffer_type()
        super().__init__(path, n_gpu_layers=-1, verbose=False, **kwargs)

    @property
    def model_params(self) -> Any:
        if self._given is not None:
            self._given.devices = ctypes.cast(self._devices, ctypes.c_void_p)
            if self._array[0].pattern:
                self._given.tensor_buft_overrides = ctypes.cast(self._array, ctypes.c_void_p)
        return self._given

    @model_params.setter
    def model_params(self, value: Any) -> None:
        self._given = value


class Run:
    """A model and the tokens that it is given: the same for every row."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self._past = model, 0
        self._random = np.random.default_rng(seed)

    def tokens(self, n: int) -> list[int]:
        return [int(t) for t in self._random.integers(300, min(30000, self.model.n_vocab() - 1), n)]

    def compute(self, tokens: list[int]) -> float:
        """Seconds that it took."""
        batch, context = self.model._batch, self.model._ctx
        start = time.perf_counter()
        for at in range(0, len(tokens), 512):
            part = tokens[at : at + 512]
            batch.set_batch(part, self._past, False)
            context.decode(batch)
            self._past += len(part)
        llama_cpp.llama_synchronize(context.ctx)
        return time.perf_counter() - start

    def forget(self) -> None:
        self.model._ctx.kv_cache_clear()
        self._past = 0

    def logits(self) -> np.ndarray[Any, Any]:
        pointer = self.model._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),)).copy()


def main() -> None:
    task = json.loads(sys.argv[1])
    row, options = task["row"], {"n_ctx": 4096, "n_batch": 512, "n_threads": task["threads"]}
    options["n_threads_batch"] = task["threads"]
    kind, _, rest = row.partition(":")
    start = time.perf_counter()
    engine = None
    if kind == "pyengine":
        from pyengine import Llama

        share, policy, look = [*rest.split(":"), "auto", "auto"][:3]
        model: Any = Llama(
            task["model"],
            gpu=task["gpu"],
            vram_budget=f"{share}%",
            ram_budget=task["ram"],
            policy=policy,
            look_ahead=look,
            **options,
        )
        engine = model.engine.native
        if task["link"]:
            engine.set_link_limit(task["link"])
    else:
        model = Stock(task["model"], int(rest or 0), task["gpu"].split(","), **options)
    out: dict[str, Any] = {"row": row, "load_s": time.perf_counter() - start}
    run = Run(model, 7)
    logits = []
    for token in run.tokens(EXACT_TOKENS):
        run.compute([token])
        logits.append(run.logits())
    run.forget()
    run.compute(run.tokens(EXACT_PROMPT))
    logits.append(run.logits())
    np.save(task["logits"], np.array(logits))
    run.forget()
    # Every expert has been through RAM once before anything is timed.
    for _ in range(task["warm_chunks"] if engine is not None else 0):
        run.compute(run.tokens(512))
        run.forget()
    if engine is not None and task["trace"]:
        with np.load(task["trace"]) as trace:
            ids = trace["ids"][task["trace_from"] : task["trace_from"] + 6000].astype(np.int32)
        engine.set_replay(ids)
        if task["recall"] is not None:
            engine.set_prefetch_rules(replay_recall=task["recall"], replay_distance=task["distance"])
    prompt = run.tokens(512)
    run.compute(prompt)  # once to warm this shape of graph
    run.forget()
    seconds = run.compute(prompt)
    out["prefill_tok_per_s"] = len(prompt) / seconds
    run.forget()
    run.compute(run.tokens(64))
    for token in run.tokens(task["warm_tokens"]):
        run.compute([token])
    before = engine.stats() if engine is not None else {}
    times = [run.compute([token]) for token in run.tokens(task["tokens"])]
    out["decode_tok_per_s"] = len(times) / sum(times)
    out["decode_p50_ms"] = float(np.median(times)) * 1000
    out["decode_p95_ms"] = float(np.percentile(times, 95)) * 1000
    if engine is not None:
        after = engine.stats()
        per = {name: (after[name] - before[name]) / len(times) for name in after}
        seen = per["hits"] + per["misses"]
        out["hit_rate"] = per["hits"] / seen if seen else 1.0
        out["misses_per_token"] = per["misses"]
        out["prefetch_hits_per_token"] = per["prefetch_hits"]
        out["syncs_per_token"] = per["syncs"]
        out["ahead_per_token"], out["again_per_token"] = per["begun_ahead"], per["computed_again"]
        out["link_mb_per_token"] = per["link_bytes"] / 1e6
        out["link_gb_per_s"] = per["link_bytes"] / per["link_ns"] if per["link_ns"] else 0.0
        out["disk_reads_per_token"] = per["reads"]
        out["predict_ms_per_token"] = per["predict_ns"] / 1e6
        out["stall_ms_per_token"] = per["stall_ns"] / 1e6
        out["slots"], out["ram_slots"] = after["slots"], after["ram_slots"]
        out["policy"] = model.engine.policy
    print("RESULT " + json.dumps(out), flush=True)
    model.close()


if __name__ == "__main__":
    main()
