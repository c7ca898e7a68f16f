"""What a cache policy hears of prompts, and of steps of several texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine.advice import keeper
from pyengine.advice.keeper import Keeper
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import Policy
from pyengine.traces.routing_log import Prompt, RoutingLog

N_LAYER, N_EXPERT = 2, 6


class Heard(Policy):
    def __init__(self) -> None:
        self.texts = 0
        self.pairs: list[NDArray[Any]] = []

    def begin_sequence(self) -> None:
        self.texts += 1

    def observe_prompt(self, pairs: NDArray[Any]) -> None:
        self.pairs.append(pairs)

    def priorities(self) -> NDArray[np.float32]:
        return np.full((N_LAYER, N_EXPERT), len(self.pairs), np.float32)


def keep(policy: str, given: list[NDArray[np.float32]], **options: str) -> Keeper:
    """`given`: gets the priorities that the engine is told."""
    native = SimpleNamespace(stats=lambda: {"slots": 6}, set_priorities=given.append)
    info = SimpleNamespace(n_layer=N_LAYER, n_expert=N_EXPERT, n_expert_used=2)
    log = SimpleNamespace(listen=lambda _: None, more=False)
    return Keeper(cast(NativeEngine, native), cast(ModelInfo, info), cast(RoutingLog, log), policy, **options)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Keeper, Heard, list[NDArray[np.float32]]]:
    """A keeper, its policy, and the priorities that the engine is told."""
    heard, given = Heard(), list[NDArray[np.float32]]()
    monkeypatch.setattr(keeper, "make_policy", lambda *_: heard)
    return keep("lfu", given), heard, given


def prompt(tokens: int, shares: tuple[int, ...]) -> Prompt:
    """All tokens choose expert 1, and one of 3 and 4."""
    experts, pairs = [1, 3, 4] * N_LAYER, [tokens, tokens - 1, 1] * N_LAYER
    return Prompt(tokens, np.full(N_LAYER, 3), np.array(experts, np.uint16), np.array(pairs), shares)


@pytest.mark.parametrize(
    ("tokens", "shares", "texts", "counts"),
    [
        (40, (), 1, 40.0),  # a prompt
        (8, (), 0, 8.0),  # nobody says what they are
        (8, (1,) * 8, 0, 1.0),
        (32, (1,) * 32, 0, 1.0),
        (40, (1, 1, 38), 0, 1.0),  # two that decode and a prompt's chunk: nobody's text ends
        (40, (30, 10), 0, 10.0),  # two prompts
    ],
)
def test_what_policies_hear(
    tokens: int,
    shares: tuple[int, ...],
    texts: int,
    counts: float,
    parts: tuple[Keeper, Heard, list[NDArray[np.float32]]],
) -> None:
    made, heard, given = parts
    made.prompt(prompt(tokens, shares))
    assert heard.texts == texts and [p.max() for p in given] == [1]
    (pairs,) = heard.pairs
    scale = counts / tokens
    expected = [0, counts, 0, (tokens - 1) * scale, scale, 0]
    np.testing.assert_allclose(pairs, [expected] * N_LAYER)


@pytest.mark.parametrize(("policy", "options"), [("lru", {}), ("arc", {"instead_of_lru": "lfu"})])
def test_several_texts_leave_other_policies_alone(policy: str, options: dict[str, str]) -> None:
    made = keep(policy, [], **options)
    made.prompt(prompt(8, (1,) * 8))
    assert made.policy == policy


def test_lru_gives_way_when_several_texts_are_computed_at_once() -> None:
    given: list[NDArray[np.float32]] = []
    made = keep("lru", given, instead_of_lru="lfu")
    made.prompt(prompt(8, ()))
    assert made.policy == "lru" and not given[-1].any()
    made.prompt(prompt(8, (1,) * 8))
    assert made.policy == "lfu" and np.argsort(-given[-1][0])[:3].tolist() == [1, 3, 4]
