"""First looks at a model of which nothing is known: what a few tokens change, what they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from pyengine import Llama
from pyengine.advice.first_looks import FirstLooks
from pyengine.advice.keeper import Keeper
from pyengine.traces.routing_log import Token


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="off", n_ctx=64)) as opened:
        yield opened


class Looked:
    """FirstLooks that see `tokens` as they come."""

    def __init__(self, llama: Llama, policy: str, judged: bool = False) -> None:
        assert llama.engine is not None
        engine = llama.engine
        self.keeper = Keeper(engine.native, engine.info, engine.routing_log, policy)
        self.seen: list[npt.NDArray[np.uint16]] = []
        self.looks = FirstLooks(
            engine.native, engine.info, self.keeper, lambda: np.array(self.seen, np.uint16), lambda: judged
        )
        self.n_layer = engine.info.n_layer

    def see(self, ids: npt.NDArray[np.int64], seconds: float = 5.0) -> str:
        self.seen.append(ids.astype(np.uint16))
        none = np.zeros((self.n_layer, 0), np.float16)
        self.looks.token(Token(self.seen[-1], np.zeros(ids.shape, np.float16), none, seconds))
        return self.keeper.policy

    def loyal(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """A few loyal experts and ever new others, for which LFU is far better than LRU."""
        return np.array([[*rng.permutation(6)[:4], *(6 + rng.permutation(26)[:4])] for _ in range(self.n_layer)])


def test_frequency_takes_over_where_it_is_clearly_better(llama: Llama) -> None:
    looked, rng = Looked(llama, "lru"), np.random.default_rng(2)
    policies = [looked.see(looked.loyal(rng)) for _ in range(256)]
    assert policies[:63] == ["lru"] * 63 and policies[-1] == "lrfu"


def test_recency_takes_over_where_a_text_moves_on(llama: Llama) -> None:
    looked = Looked(llama, "lrfu")
    themes = [np.tile(8 * (n // 24) % 32 + np.arange(8), (looked.n_layer, 1)) for n in range(256)]
    policies = [looked.see(theme) for theme in themes]
    assert policies[:63] == ["lrfu"] * 63 and "lru" in policies


def test_fast_tokens_are_not_held_up(llama: Llama) -> None:
    looked, rng = Looked(llama, "lru"), np.random.default_rng(2)
    assert {looked.see(looked.loyal(rng), seconds=0.004) for _ in range(300)} == {"lru"}


def test_a_judgement_ends_them(llama: Llama) -> None:
    looked, rng = Looked(llama, "lru", judged=True), np.random.default_rng(2)
    assert {looked.see(looked.loyal(rng)) for _ in range(100)} == {"lru"}
