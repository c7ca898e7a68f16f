"""A model, samples and a child's answer that no machine has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyengine.bench.rows import ModelFacts
from pyengine.bench.samples import Sample

#: 10 layers of 8 experts of 1 MB, 2 of them used by a token; 20 MB of other weights.
FACTS = ModelFacts(
    path=Path("models/toy.gguf"),
    files=(Path("models/toy.gguf"),),
    architecture="llama",
    kernels="",
    file_bytes=100_000_000,
    expert_bytes=80_000_000,
    slot_bytes=80_000_000,
    least_budget=1_000_000,
    largest_other=5_000_000,
    n_layer=10,
    n_expert=8,
    n_expert_used=2,
    n_experts=80,
    n_matrix=3,
)

_NONE = dict.fromkeys(("share", "limit_bytes", "disk_limit_mb_per_s"))


def make_sample(**changes: Any) -> Sample:
    """An "ok" sample of stock-resident in round 0 of toy.gguf, with some fields changed."""
    kind = changes.get("kind", "stock-resident")
    share = changes.get("share")
    known: dict[str, Any] = {
        **_NONE,
        "model": "toy.gguf",
        "kind": kind,
        "row": kind if share is None else f"{kind} {share:g}%",
        "round": 0,
        "order": 0,
        "status": "ok",
        "reason": "",
        "budget_bytes": 0,
        "replay": "",
    }
    return Sample(**(known | changes))


def child_result(tokens: list[list[int]], **changes: Any) -> dict[str, Any]:
    """What a child of pyengine's rows prints, with 10 decoded tokens in 2 s."""
    counts = {
        "cpu_s": 4.0,
        "io_cpu_s": 0.06,
        "disk_bytes": 45e6,
        "hits": 140,
        "misses": 60,
        "bytes_read": 40e6,
        "reads": 180,
        "stall_s": 0.5,
        "io_s": 0.4,
    }
    phase = {"seconds": 2.0, "tokens": 10, "counts": counts, "step_seconds": [0.1] * 9 + [1.1]}
    phases = {name: dict(phase) for name in ("prompt", "decode_cold", "prefill", "decode")}
    phases["prompt"] |= {"seconds": 0.5, "tokens": 30}
    phases["prefill"] |= {"seconds": 4.0, "tokens": 512}
    known = {"status": "ok", "load_s": 1.5, "peak_rss": 300, "libraries": [], "engaged": "", "phases": phases}
    return {**known, "tokens": tokens, **changes}
