"""Policies x predictors x sizes of cache over one trace: what `pyengine replay` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.errors import UsageError
from pyengine.policies import LEARNED, POLICIES, is_policy, make_policy
from pyengine.replay.bounds import belady, sch
from pyengine.replay.hits import Misses, replay_policy
from pyengine.replay.layout import Layout
from pyengine.replay.predictors import Correlation, Given, Popularity, Predictor, RepeatLast, Simulated, TokenTable
from pyengine.replay.quality import recall
from pyengine.replay.steps import Steps
from pyengine.replay.timed import Prefetching, TimedReplay
from pyengine.replay.timing import Timing

BELADY, LRU, NONE = "belady", "lru", "none"
#: What knows the future.
BOUNDS: dict[str, Callable[[Steps, Layout], Misses]] = {BELADY: belady, "sch": sch}

#: Layers ahead for which predictors are judged.
DISTANCES = (1, 2, 3)
PREDICTOR_WORDS = "none, repeat, popularity, correlation, tokens, simulated:RECALL, scores:FILE.npy"


@dataclass(frozen=True)
class Result:
    """One policy with one predictor and one size of cache."""

    policy: str
    predictor: str
    layout: Layout
    misses: Misses | None
    """without prefetching; None if a predictor is at work"""
    figures: dict[str, Any] = field(default_factory=dict)
    """of the timed replay, see Tally.figures"""

    @property
    def hit_rate(self) -> float:
        if self.misses is not None:
            return self.misses.hit_rate
        return float(self.figures["hit_rate"])

    def as_json(self, gap: float | None) -> dict[str, Any]:
        out: dict[str, Any] = {
            "policy": self.policy,
            "predictor": self.predictor,
            "slots": self.layout.total,
            "slots_per_layer": self.layout.cache_shape.slots_per_layer,
            "shared": not self.layout.per_layer,
            "hit_rate": self.hit_rate,
            "gap_closed": gap,
        }
        if self.misses is not None:
            out["hit_rate_by_layer"] = self.misses.by_layer
            out["missing_per_token"] = float(self.misses.missing.sum()) / self.misses_tokens
            n = int(self.misses.prompt_wanted.sum())
            out["prompt_hit_rate"] = 1 - int(self.misses.prompt_missing.sum()) / n if n else None
        return out | self.figures

    @property
    def misses_tokens(self) -> int:
        assert self.misses is not None
        return max(1, int(self.misses.wanted[0]) // self.layout.n_expert_used)


def make_predictor(name: str, steps: Steps, distance: int) -> Predictor | None:
    """A fresh predictor by its name, one of PREDICTOR_WORDS.

    Raises:
        UsageError: not understood, or the trace lacks what it needs.
        OSError: a file of scores that cannot be read.
    """
    kind, _, value = name.partition(":")
    if kind == "simulated":
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UsageError(f"the recall of a simulated predictor is a number from 0 to 1, not {value!r:.20}")
        return Simulated(steps, share)
    if kind == "scores" and value:
        return Given(_scores(Path(value), steps))
    if name == "tokens" and steps.tokens is None:
        raise UsageError("this trace has no token ids, so there can be no table of tokens")
    simple: dict[str, Callable[[], Predictor | None]] = {
        NONE: lambda: None,
        "repeat": lambda: RepeatLast(steps),
        "popularity": lambda: Popularity(steps),
        "correlation": lambda: Correlation(steps, distance),
        "tokens": lambda: TokenTable(steps),
    }
    if name not in simple:
        raise UsageError(f"there is no predictor {name!r:.40}; there are {PREDICTOR_WORDS}")
    return simple[name]()


def _scores(path: Path, steps: Steps) -> Any:
    wanted = (steps.n_token, steps.n_layer, steps.n_expert)
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{path} holds no array of scores") from error
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.ndim != 3 or len(scores) < wanted[0]:
        raise UsageError(f"{path} holds no scores for {wanted[0]} tokens")
    if scores.shape[1:] != wanted[1:]:
        raise UsageError(f"{path} has scores of the shape {scores.shape}; the trace needs {wanted}")
    return scores[len(scores) - wanted[0] :]  # the last tokens, as of the trace


def replay_all(
    steps: Steps,
    layouts: Sequence[Layout],
    policies: Sequence[str],
    predictors: Sequence[str],
    timing: Timing | None,
    rules: Prefetching,
    say: Callable[[str], None],
) -> list[Result]:
    """Every policy with every predictor at every size, oracles once at each size. Raises UsageError, OSError, and
    LearnedPolicyError: see make_policy."""
    for name in policies:
        if not is_policy(name) and name not in BOUNDS:
            known = (*POLICIES, f"{LEARNED}:FILE", *BOUNDS)
            raise UsageError(f"there is no cache policy {name!r:.40}; there are {', '.join(known)}")
        if name not in BOUNDS and name not in POLICIES:
            make_policy(name, layouts[0].cache_shape)  # a file that cannot be used is said before all the others run
    for name in predictors:
        if make_predictor(name, steps, rules.distance) is not None and timing is None:
            raise UsageError("prefetching needs times: --bandwidth, --compute and --expert-bytes, or -m for the sizes")
    results = []
    for layout in layouts:
        for policy in policies:
            if policy in BOUNDS:
                say(f"{policy}, {layout.total} slots")
                results.append(_plain(policy, BOUNDS[policy](steps, layout), layout, steps, timing))
                continue
            for name in predictors:
                say(f"{policy}, {layout.total} slots" + (f", predictor {name}" if name != NONE else ""))
                results.append(_online(policy, name, steps, layout, timing, rules))
    return results


def _plain(policy: str, misses: Misses, layout: Layout, steps: Steps, timing: Timing | None) -> Result:
    figures: dict[str, Any] = {}
    if timing is not None:
        figures["bound_tokens_per_s"] = timing.bound_tokens_per_s(float(misses.missing.sum()) / max(1, steps.n_token))
    return Result(policy, NONE, layout, misses, figures)


def _online(policy: str, name: str, steps: Steps, layout: Layout, timing: Timing | None, rules: Prefetching) -> Result:
    made = make_policy(policy, layout.cache_shape)
    if timing is None:
        return Result(policy, name, layout, replay_policy(steps, layout, made))
    replay = TimedReplay(steps, layout, made, timing, make_predictor(name, steps, rules.distance), rules)
    tally = replay.run_timed()
    figures = tally.figures(timing)
    if name != NONE:
        return Result(policy, name, layout, None, figures)
    plain = _plain(policy, replay.misses(), layout, steps, timing)
    return Result(policy, name, layout, plain.misses, figures | plain.figures)


def gaps_closed(results: Sequence[Result]) -> list[float | None]:
    """By result: how much of the way from LRU to Belady at its size it goes, both without prefetching; None: not
    known."""
    out: list[float | None] = []
    for result in results:
        ends = {
            r.policy: r.hit_rate
            for r in results
            if r.layout == result.layout and r.predictor == NONE and r.policy in (LRU, BELADY)
        }
        known = len(ends) == 2 and ends[BELADY] > ends[LRU]
        out.append((result.hit_rate - ends[LRU]) / (ends[BELADY] - ends[LRU]) if known else None)
    return out


def judge_predictors(
    steps: Steps, predictors: Sequence[str], more: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """By predictor, its recall at every distance; what was given as scores has one distance only."""
    out = {}
    for name in predictors:
        judged = []
        for distance in DISTANCES if name == "correlation" else DISTANCES[:1]:
            predictor = make_predictor(name, steps, distance)
            if predictor is not None:
                say(f"recall of {name}, {distance} ahead")
                judged.append(recall(steps, predictor, distance, more).as_json())
        if judged:
            out[name] = judged
    return out
