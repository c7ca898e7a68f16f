"""Puts shape, routing and measurement together: what each budget holds, what it misses, how fast it is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.advice.profile import load_profile, profile_file
from pyengine.budget import Budget, available_memory, reserve, resolve
from pyengine.cache import cache_dir
from pyengine.planning.measured import Measured
from pyengine.planning.predict import ExpertCounts, decode_seconds, prefill_seconds
from pyengine.planning.routing import Routing, routing_of_recent, routing_of_trace, uniform_routing
from pyengine.planning.shape import ModelShape
from pyengine.traces import Trace, TraceError, load_trace

#: Shares of all experts that every plan shows.
SHARES = ("12.5%", "25%", "50%", "75%", "100%")
#: Prompts a plan predicts, tokens, and which of them the table shows.
PROMPTS = (64, 512, 2048)
PROMPT = 512
#: Tokens of context that decoding is predicted after: an answer of some length to a question.
_PAST = 256
#: Contexts a plan shows, tokens, and the model's own.
CONTEXTS = (4096, 16384, 32768, 131072)


@dataclass(frozen=True)
class Prediction:
    """Speeds at one budget. `cold` is the first prompt after loading, the others come after the slots are full."""

    hit_rate: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: dict[int, float]
    """by prompt length, tokens"""
    cold_prefill_tokens_per_s: dict[int, float]
    first_token_s: float
    """after a prompt of PROMPT tokens, cold, loading not included"""
    bytes_per_token: float


@dataclass(frozen=True)
class BudgetLine:
    name: str
    """as the user would write it"""
    budget_bytes: int
    slots_per_layer: float
    total_bytes: int
    """with the other weights and the KV cache"""
    fits: bool
    hit_rate: float
    prediction: Prediction | None


@dataclass(frozen=True)
class Plan:
    shape: ModelShape
    n_ctx: int
    available_bytes: int
    reserve_bytes: int
    routing: str
    lines: list[BudgetLine]
    contexts: list[tuple[int, int, bool]]
    """(tokens, bytes of KV cache, whether it fits beside the least budget)"""
    largest_context: int
    """that fits beside the least budget, tokens, a multiple of 256; 0 if none does"""

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; sizes in bytes, times in seconds."""
        info = self.shape.info
        return {
            "model": str(self.shape.path),
            "architecture": info.architecture,
            "layers": info.n_layer,
            "experts": info.n_expert,
            "experts_used": info.n_expert_used,
            "expert_bytes": info.expert_bytes,
            "slot_bytes": info.slot_bytes,
            "other_bytes": self.shape.other_bytes,
            "least_budget": info.least_budget,
            "available_bytes": self.available_bytes,
            "reserve_bytes": self.reserve_bytes,
            "n_ctx": self.n_ctx,
            "kv_bytes_per_token": self.shape.kv_bytes_per_token,
            "contexts": [{"tokens": n, "kv_bytes": size, "fits": fits} for n, size, fits in self.contexts],
            "largest_context": self.largest_context,
            "routing": self.routing,
            "budgets": [_line_json(line) for line in self.lines],
        }


def _line_json(line: BudgetLine) -> dict[str, Any]:
    out: dict[str, Any] = {
        "budget": line.name,
        "bytes": line.budget_bytes,
        "slots_per_layer": line.slots_per_layer,
        "total_bytes": line.total_bytes,
        "fits": line.fits,
        "hit_rate": line.hit_rate,
    }
    if line.prediction is not None:
        out["decode_tokens_per_s"] = line.prediction.decode_tokens_per_s
        out["prefill_tokens_per_s"] = line.prediction.prefill_tokens_per_s
        out["cold_prefill_tokens_per_s"] = line.prediction.cold_prefill_tokens_per_s
        out["first_token_s"] = line.prediction.first_token_s
        out["bytes_per_token"] = line.prediction.bytes_per_token
    return out


def default_trace(model: Path) -> Path:
    """Where the routing trace of this model lies unless another file is named. Raises OSError: no such model."""
    return cache_dir() / "traces" / f"{model.stem}-{model.stat().st_size:x}.npz"


def find_routing(shape: ModelShape, trace: Path | None) -> tuple[Routing, str]:
    """The routing to plan with, and a few words on where it comes from: the trace named, else the model's recorded one
    if there is a usable one, else the end of what its profile has seen, else uniform.

    Raises:
        OSError, TraceError: the trace that was named cannot be read, or is of another model.
    """
    recorded = default_trace(shape.path)
    if trace is not None:
        routing = _fitting(shape, load_trace(trace), str(trace))
        return routing, f"trace {trace.name}, {len(routing.ids)} tokens"
    if recorded.exists():
        try:
            routing = _fitting(shape, load_trace(recorded), str(recorded))
            return routing, f"recorded trace, {len(routing.ids)} tokens"
        except (OSError, TraceError):
            pass  # it was made by us and can be made again
    info = shape.info
    with contextlib.suppress(OSError):
        kept = load_profile(profile_file(shape.path), info)
        recent = None if kept is None else routing_of_recent(kept.recent, info.n_expert)
        if recent is not None:
            return recent, f"the last {len(recent.ids)} tokens of earlier runs"
    return uniform_routing(info.n_layer, info.n_expert, info.n_expert_used), "uniform, no trace of this model yet"


def _fitting(shape: ModelShape, trace: Trace, name: str) -> Routing:
    model, info = trace.model, shape.info
    same = (model.n_layer, model.n_expert_used) == (info.n_layer, info.n_expert_used)
    if model.architecture:
        same = same and (model.architecture, model.n_expert) == (info.architecture, info.n_expert)
    if not same or model.n_expert > info.n_expert:
        raise TraceError(
            f"{name} is of another model: {model.n_layer} layers, {model.n_expert_used} of {model.n_expert} experts; "
            f"this one has {info.n_layer} layers, {info.n_expert_used} of {info.n_expert}"
        )
    routing = routing_of_trace(trace)
    if routing is None:
        raise TraceError(f"{name} has only {len(trace.ids)} tokens, too few to plan with")
    return routing


def predict(
    shape: ModelShape, routing: Routing, measured: Measured | None, budget: int, n_past: int = _PAST
) -> tuple[float, Prediction | None]:
    """(hit rate of decoding, speeds if there is a measurement) with slots for `budget` bytes, decoding after `n_past`
    tokens of context."""
    layers = [c.layers for c in shape.classes]
    slots = shape.slots(budget)
    decode = routing.decode(layers, slots)
    if measured is None:
        return decode.hit_rate, None
    counts = ExpertCounts(shape.info.n_layer, shape.info.n_expert_used)

    def seconds(n: int, cold: bool) -> float:
        return prefill_seconds(
            measured, counts, n, lambda m, first: routing.prefill(m, layers, slots, cold=first), cold=cold
        )

    warm = {n: n / seconds(n, False) for n in PROMPTS}
    cold = {n: n / seconds(n, True) for n in PROMPTS}
    ratio = measured.bytes_per_miss / shape.expert_bytes if measured.bytes_per_miss else 1.0
    size = {layer: c.expert_bytes for c in shape.classes for layer in c.layers}
    read = sum(float(decode.per_layer[layer]) * size[layer] for layer in size) * ratio
    return decode.hit_rate, Prediction(
        hit_rate=decode.hit_rate,
        decode_tokens_per_s=1.0 / decode_seconds(measured, decode, n_past),
        prefill_tokens_per_s=warm,
        cold_prefill_tokens_per_s=cold,
        first_token_s=PROMPT / cold[PROMPT],
        bytes_per_token=read,
    )


def make_plan(
    shape: ModelShape,
    budgets: Sequence[Budget],
    n_ctx: int,
    routing: Routing,
    routing_words: str,
    measured: Measured | None,
    available: int | None = None,
) -> Plan:
    """The plan for these budgets.

    Args:
        budgets: as pyengine.Llama takes them; "auto" is what the machine could spare now.
        n_ctx: tokens of context; 0 is the model's own.
        available: bytes this process could take now; None asks the system.

    Raises:
        BudgetError: a budget is not understood or below the least.
    """
    info = shape.info
    n_ctx = n_ctx or shape.n_ctx_train
    spare = available_memory() if available is None else available
    fixed = shape.other_bytes + (measured.overhead_bytes if measured is not None else 0)
    base = fixed + n_ctx * shape.kv_bytes_per_token
    lines = []
    for budget in budgets:
        size = resolve(budget, slot_bytes=info.slot_bytes, least=info.least_budget, available=spare - base)
        hit_rate, prediction = predict(shape, routing, measured, size)
        lines.append(
            BudgetLine(
                name=str(budget),
                budget_bytes=size,
                slots_per_layer=sum(shape.slots(size)) / info.n_layer,
                total_bytes=size + base,
                fits=size + base <= spare,
                hit_rate=hit_rate,
                prediction=prediction,
            )
        )
    room = max(0, spare - fixed - info.least_budget)
    lengths = sorted({*(n for n in CONTEXTS if n < shape.n_ctx_train), shape.n_ctx_train, n_ctx} - {0})
    contexts = [(n, n * shape.kv_bytes_per_token, n * shape.kv_bytes_per_token <= room) for n in lengths]
    most = room // shape.kv_bytes_per_token if shape.kv_bytes_per_token else shape.n_ctx_train
    if shape.n_ctx_train:
        most = min(most, shape.n_ctx_train)
    return Plan(shape, n_ctx, spare, reserve(), routing_words, lines, contexts, most // 256 * 256)


def budgets_to_show(shape: ModelShape, wanted: str | int) -> list[Budget]:
    """The usual shares that are not below the least budget, the one asked for, and auto."""
    least = shape.info.least_budget
    shares: list[Budget] = [s for s in SHARES if float(s[:-1]) / 100 * shape.info.slot_bytes >= least]
    return [*shares, *([wanted] if wanted not in (*shares, "auto") else []), "auto"]
