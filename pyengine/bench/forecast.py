"""What `pyengine plan` would say of a row, in a child (`python -m pyengine.bench.forecast`) that runs right before the
row's sample: the planner's probe, then its prediction with the trace of these texts and without any."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.errors import one_line
from pyengine.planning.measured import Measured
from pyengine.planning.plan import find_routing
from pyengine.planning.predict import ExpertCounts, decode_seconds, prefill_seconds
from pyengine.planning.probe import measure
from pyengine.planning.routing import Routing, uniform_routing
from pyengine.planning.shape import ModelShape, read_shape

#: Tokens of the benchmark's short prompts, about.
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """A row (see child.Task), and the trace of its texts."""

    model: str
    bundle: str
    budget: int
    n_tokens: int
    prefill_tokens: int
    trace: str


def forecast(question: Question) -> dict[str, Any]:
    """Columns of Sample that begin with "plan_", after a trace, and "guess_", before there is one."""
    shape = read_shape(Path(question.model))
    info = shape.info
    measured = measure(shape, bundle=question.bundle)
    traced, _ = find_routing(shape, Path(question.trace))
    untraced = uniform_routing(info.n_layer, info.n_expert, info.n_expert_used)
    return {
        f"{name}_{figure}": value
        for name, routing in (("plan", traced), ("guess", untraced))
        for figure, value in _speeds(shape, routing, measured, question).items()
    }


def _speeds(shape: ModelShape, routing: Routing, measured: Measured, question: Question) -> dict[str, float]:
    layers, slots = [c.layers for c in shape.classes], shape.slots(question.budget)
    counts = ExpertCounts(shape.info.n_layer, shape.info.n_expert_used)
    decode = routing.decode(layers, slots)
    prefill = prefill_seconds(
        measured,
        counts,
        question.prefill_tokens,
        lambda n, first: routing.prefill(n, layers, slots, cold=first),
        cold=False,
    )
    return {
        "decode_tok_per_s": 1 / decode_seconds(measured, decode, _PROMPT_TOKENS + question.n_tokens // 2),
        "prefill_tok_per_s": question.prefill_tokens / prefill,
        "hit_rate": decode.hit_rate,
    }


def main() -> None:
    """Answer the Question on standard input with one line of JSON."""
    try:
        result: dict[str, Any] = forecast(Question(**json.load(sys.stdin)))
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(str(error))}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
