"""Learning in the run: it descends the loss, from tokens of one text, and wins where a run differs from what was
learned from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from pyengine.policies import CacheShape, learned
from pyengine.policies.adapting import _STEP, AHEAD, REACH, Adaptation, Floats, Seen
from pyengine.policies.learned import LearnedPolicy, blank

N, N_USED, N_WHERE, N_IN, N_UNIT = 12, 3, 2, 7, 5
#: Tokens after which it learns for the first time: the text's first few, with all that came after them.
FIRST = AHEAD + 1 + _STEP


def _known(seed: int = 0) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    shapes = {"bias": (N_WHERE, N), "into": (N_IN, N_UNIT), "offset": (N_UNIT,), "out": (N_UNIT, N)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _tokens(n: int, seed: int = 1) -> list[Seen]:
    random = np.random.default_rng(seed)
    return [
        Seen(
            random.permutation(N)[:N_USED],
            random.standard_normal(N).astype(np.float16).astype(np.float32),
            random.standard_normal(N_IN).astype(np.float16).astype(np.float32),
        )
        for _ in range(n)
    ]


def _loss(known: dict[str, Floats], tokens: list[Seen], at: int) -> float:
    """Logistic, of the odds after token `at`, as the module's words have it."""
    seen = tokens[at]
    units = np.tanh(seen.inputs @ known["into"] + known["offset"])
    odds = seen.own + seen.inputs[-N_WHERE:] @ known["bias"] + units @ known["out"]
    ahead = np.zeros(N)
    for i, token in enumerate(tokens[at + 2 : at + 2 + AHEAD]):
        ahead[token.used] += (1 - REACH) * REACH**i
    free = np.ones(N, np.bool_)
    free[tokens[at + 1].used] = False
    return float(np.sum((np.logaddexp(0, odds) - ahead * odds)[free], dtype=np.float64))


def test_a_step_is_the_gradient_of_the_loss() -> None:
    tokens, known = _tokens(FIRST), _known()
    before = {name: a.copy() for name, a in known.items()}
    adaptation = Adaptation(known, N_WHERE)
    for token in tokens[:-1]:
        adaptation.token(token)
    for name, a in known.items():
        np.testing.assert_array_equal(a, before[name])
    adaptation.token(tokens[-1])

    def slope(name: str, at: tuple[int, ...]) -> float:
        step, sums = np.float32(1e-2), []
        for sign in (1, -1):
            moved = {key: a.copy() for key, a in before.items()}
            moved[name][at] += sign * step
            sums.append(sum(_loss(moved, tokens, i) for i in range(_STEP)))
        return (sums[0] - sums[1]) / (2 * float(step))

    for name, rate in (("bias", 3e-3), ("out", 1e-4), ("into", 0.077 / N), ("offset", 0.077 / N)):
        for at in [(0,) * before[name].ndim, tuple(k - 1 for k in before[name].shape)]:
            assert known[name][at] - before[name][at] == pytest.approx(-rate * slope(name, at), rel=0.03, abs=1e-5)


def test_what_is_interrupted_teaches_nothing() -> None:
    known = _known()
    before = {name: a.copy() for name, a in known.items()}
    adaptation = Adaptation(known, N_WHERE)
    for i, token in enumerate(_tokens(20 * AHEAD)):
        if i % AHEAD == 0:
            adaptation.interrupt()
        adaptation.token(token)
    for name, a in known.items():
        np.testing.assert_array_equal(a, before[name])


SHAPE = CacheShape(n_layer=2, n_expert=12, n_expert_used=2, slots=12, per_layer=True)


def _cyclic(n: int) -> npt.NDArray[np.uint16]:
    """A cycle: which experts come next is not what was used most of late."""
    random = np.random.default_rng(7)
    ids = np.empty((n, SHAPE.n_layer, 2), np.uint16)
    for t in range(n):
        first = 2 * (t // 12 % 6)
        ids[t] = first + np.arange(2) if random.random() < 0.8 else random.permutation(12)[:2]
    return ids


def _lost(policy: LearnedPolicy, ids: npt.NDArray[np.uint16], interrupt: Callable[[], None] | None) -> float:
    """Uses by experts in the lower half of their layer, in the second half of the tokens."""
    lost = 0
    for t, token in enumerate(ids):
        if t >= len(ids) // 2:
            odds = policy.priorities()
            of_used = np.take_along_axis(odds, token.astype(np.int64), axis=1)
            lost += int((of_used < np.median(odds, axis=1)[:, None]).sum())
        policy.observe(token, None)
        if interrupt is not None:
            interrupt()
    return lost


def test_a_run_unlike_what_was_learned_from_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_UNITS", 32)
    ids = _cyclic(10_000)

    def fresh() -> LearnedPolicy:
        policy = LearnedPolicy(SHAPE)
        policy.take(blank(SHAPE.n_layer * SHAPE.n_expert))
        return policy

    frozen, adapting = fresh(), fresh()
    assert _lost(adapting, ids, None) < 0.8 * _lost(frozen, ids, frozen._interrupt)
    assert all(np.isfinite(a).all() for a in adapting.parameters.values())
