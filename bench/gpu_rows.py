"""The ways to run one model on a GPU that gpu_*.py compare, and how each is loaded. A row is written KIND or
KIND:SHARE, the share being the percent of the expert bytes that VRAM may hold.

Stock llama.cpp: `stock` has all in VRAM; `ncmoe:SHARE` the experts of the first layers on the CPU, `ot:SHARE` whole
tensors, all layers' up projections first, `ngl:SHARE` the first layers with all that is in them. What does not come out
even is rounded in stock's favour. Host operations of many tokens are offloaded, as by default.
Ours: kinds of pyengine.bench.rows; `auto` is pyengine as it comes, `all-moved` the same with no expert computed on the
CPU, as in every baseline.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp

STOCK, NCMOE, OT, NGL = "stock", "ncmoe", "ot", "ngl"
SPLITS = (NCMOE, OT, NGL)
AUTO, ALL_MOVED, ON_DEMAND, ACTIVATION_PATH = "auto", "all-moved", "on-demand", "activation-path"
WITHOUT_SHARE = (STOCK, ON_DEMAND)


class Row(NamedTuple):
    kind: str
    share: float | None

    @property
    def stock(self) -> bool:
        return self.kind in (STOCK, *SPLITS)

    def __str__(self) -> str:
        return self.kind if self.share is None else f"{self.kind}:{self.share:g}"


def parse(text: str) -> Row:
    """Raises ValueError for what is no row."""
    from pyengine.bench.rows import ADVICE

    kind, _, share = text.partition(":")
    if kind not in (STOCK, *SPLITS, ALL_MOVED, *ADVICE):
        raise ValueError(f"there is no row {kind!r}")
    if (kind in WITHOUT_SHARE) == bool(share):
        raise ValueError(f"{kind} takes {'no' if share else 'a'} share")
    if share and not 0 < float(share) <= 100:
        raise ValueError(f"{share} % is not above 0 and at most 100")
    return Row(kind, float(share) if share else None)


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h, which llama_cpp leaves out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class _Split(llama_cpp.Llama):
    """llama_cpp.Llama with the tensors of some names in RAM, as llama.cpp's own programs can place them."""

    def __init__(self, path: str, in_ram: str, **how: Any) -> None:
        lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        self._given: Any = None
        self._array = (_Override * 2)()
        self._array[0].pattern = in_ram.encode()
        self._array[0].buft = lib.ggml_backend_cpu_buffer_type()
        super().__init__(path, **how)

    # The base class builds and uses this in its __init__; the field is set as soon as it is there.
    @property
    def model_params(self) -> Any:
        if self._given is not None and self._array[0].pattern:
            self._given.tensor_buft_overrides = ctypes.cast(self._array, ctypes.c_void_p)
        return self._given

    @model_params.setter
    def model_params(self, value: Any) -> None:
        self._given = value


def _in_ram(row: Row, n_layer: int) -> str:
    """Names of the expert tensors that the row keeps in RAM; empty: none."""
    if row.share is None or row.kind not in (NCMOE, OT):
        return ""
    gone = 1 - row.share / 100
    if row.kind == NCMOE:
        layers = "|".join(str(i) for i in range(int(n_layer * gone + 1e-9)))
        return rf"blk\.({layers})\.ffn_(up|down|gate|gate_up)_exps\.weight" if layers else ""
    kinds = ("up", "gate", "down")
    tensors = [f"{i}.ffn_{kind}" for kind in kinds for i in range(n_layer)][: int(3 * n_layer * gone + 1e-9)]
    names = "|".join(tensor.replace(".", r"\.") for tensor in tensors)
    return rf"blk\.({names})_exps\.weight" if names else ""


def load(row: Row, task: dict[str, Any]) -> Any:
    """A llama_cpp.Llama. task: model, gpu, ram (a budget), threads, n_ctx, ubatch, n_layer, logits_all; recall and
    distance of simulated guesses, or None."""
    how: dict[str, Any] = {
        "n_ctx": task["n_ctx"],
        "n_batch": max(512, task["ubatch"]),
        "n_ubatch": task["ubatch"],
        "n_threads": task["threads"],
        "n_threads_batch": task["threads"],
        "logits_all": task.get("logits_all", False),
        "op_offload": True,
        "verbose": False,
    }
    if not row.stock:
        return _ours(row, task, how)
    layers = -1
    if row.kind == NGL:
        assert row.share is not None
        layers = task["n_layer"] - int(task["n_layer"] * (1 - row.share / 100) + 1e-9) + 1  # and what is no layer
    return _Split(task["model"], _in_ram(row, task["n_layer"]), n_gpu_layers=layers, **how)


def _ours(row: Row, task: dict[str, Any], how: dict[str, Any]) -> Any:
    import pyengine
    from pyengine.bench.activation_path import PathPrefetcher
    from pyengine.bench.rows import ADVICE
    from pyengine.traces.routing_log import RoutingLog

    logging.getLogger("pyengine").setLevel(logging.WARNING)
    advice = ADVICE[AUTO if row.kind == ALL_MOVED else row.kind]
    model = pyengine.Llama(
        task["model"],
        gpu=task["gpu"],
        vram_budget=_one_layer(task) if row.kind == ON_DEMAND else f"{row.share:g}%",
        ram_budget="0" if row.share == 100 else task["ram"],  # nothing that is in VRAM is read again
        policy=advice.policy,
        look_ahead=advice.look_ahead,
        **how,
    )
    engine = model.engine
    assert engine is not None
    rules: dict[str, Any] = dict(advice.rules)
    if task["recall"] is not None and advice.look_ahead != "off":
        rules |= {"replay_recall": task["recall"], "replay_distance": task["distance"]}
    engine.native.set_prefetch_rules(**rules)
    if row.kind != AUTO:
        engine.native.set_host_threads(0)
    if row.kind == ACTIVATION_PATH:
        engine.routing_log = RoutingLog(engine.native)  # it is told of every token at once: it fetches at its start
        PathPrefetcher(engine.native, engine.info, engine.routing_log)
    return model


def _one_layer(task: dict[str, Any]) -> int:
    """Bytes of slots for what one token uses in one layer."""
    from pyengine.native import NativeEngine

    native = NativeEngine(task["model"])
    try:
        native.use_gpus(task["gpu"].split(","))
        return native.info.least_budget
    finally:
        native.close()
