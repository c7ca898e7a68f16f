"""How cacheable a model's routing is, whatever the cache: SRP and SCH (local routing consistency, arXiv 2505.16056)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.replay.bounds import SEGMENT, sch
from pyengine.replay.layout import own_slots
from pyengine.replay.steps import Steps

#: Slots per layer for which SCH is given, in multiples of the experts a token uses.
RHOS = (1.0, 1.5, 2.0, 3.0)
#: SRP(16) between random routing (0) and perfectly steady routing (1), from which on the words hold. The paper's
#: figures make Qwen3-30B-A3B 0.40, OLMoE 0.28, DeepSeek-V2-Lite 0.14, Qwen1.5-MoE 0.09 and Mixtral 8x7B 0.07.
_VERDICTS = ((0.25, "very cacheable"), (0.12, "cacheable"), (0.04, "hard to cache"))
_LAST_VERDICT = "not cacheable: routing looks random"


@dataclass(frozen=True)
class Locality:
    segment: int
    """tokens"""
    srp: float
    """SRP(segment), 0 to 1, mean over layers"""
    srp_by_layer: tuple[float, ...]
    srp_random: float
    """the same of random routing of this shape"""
    sch: tuple[tuple[float, int, float], ...]
    """(rho, slots per layer, SCH(segment, rho))"""

    @property
    def steadiness(self) -> float:
        """SRP between that of random routing (0) and 1."""
        return (self.srp - self.srp_random) / (1 - self.srp_random) if self.srp_random < 1 else 0.0

    @property
    def verdict(self) -> str:
        if math.isnan(self.srp):
            return "too short a trace to say how cacheable the model is"
        return next((words for least, words in _VERDICTS if self.steadiness >= least), _LAST_VERDICT)

    def as_json(self) -> dict[str, Any]:
        return {
            "segment": self.segment,
            "srp": None if math.isnan(self.srp) else self.srp,
            "srp_random": self.srp_random,
            "srp_by_layer": None if math.isnan(self.srp) else list(self.srp_by_layer),
            "steadiness": None if math.isnan(self.srp) else self.steadiness,
            "sch": [{"rho": rho, "slots_per_layer": slots, "hit_rate": rate} for rho, slots, rate in self.sch],
            "verdict": self.verdict,
        }


def srp(ids: npt.NDArray[np.uint16], n_expert: int, segment: int = SEGMENT) -> npt.NDArray[np.float64]:
    """SRP(segment) by layer, float64 [n_layer]: the F1 of the best single set of experts for all tokens of a segment,
    mean over segments. NaN if there is no whole segment.

    Args:
        ids: uint16 [n_token, n_layer, n_expert_used].
    """
    n_token, n_layer, n_used = ids.shape
    n = n_token // segment
    out = np.full(n_layer, np.nan)
    if not n:
        return out
    sizes = np.arange(1, n_expert + 1)
    first = np.arange(n)[:, None] * n_expert
    for layer in range(n_layer):
        of_segments = ids[: n * segment, layer].reshape(n, segment * n_used).astype(np.int64)
        counts = np.bincount((of_segments + first).ravel(), minlength=n * n_expert).reshape(n, n_expert)
        covered = np.cumsum(-np.sort(-counts, axis=1), axis=1)
        # Precision is covered / (segment * size), recall covered / (segment * n_used).
        out[layer] = (2 * covered / (segment * (sizes + n_used))).max(axis=1).mean()
    return out


def random_srp(n_expert: int, n_used: int, segment: int = SEGMENT, n_segment: int = 400) -> float:
    """SRP of routing in which every set of experts is equally likely."""
    scores = np.random.default_rng(0).random((n_segment * segment, 1, n_expert))
    ids = np.argpartition(scores, n_used - 1, axis=2)[:, :, :n_used].astype(np.uint16)
    return float(srp(ids, n_expert, segment)[0])


def locality(steps: Steps, segment: int = SEGMENT) -> Locality:
    """SRP and SCH of a trace."""
    n_used = int(steps.ids.shape[2])
    by_layer = srp(steps.ids, steps.n_expert, segment)
    slots = sorted({(rho, min(steps.n_expert, max(1, int(rho * n_used)))) for rho in RHOS})
    rates = [
        (rho, n, sch(steps, own_slots(steps.n_layer, steps.n_expert, n_used, n), segment).hit_rate) for rho, n in slots
    ]
    return Locality(
        segment,
        float(by_layer.mean()),
        tuple(by_layer.tolist()),
        random_srp(steps.n_expert, n_used, segment),
        tuple(rates),
    )
