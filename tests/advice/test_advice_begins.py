"""Policy and predictors come with the first budget too small for all experts: once, and again if they failed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyengine import Llama, engine, pressure
from pyengine.advice import auto, foresight
from pyengine.advice.auto import AutoPolicy
from pyengine.advice.keeper import Keeper
from pyengine.traces.routing_log import RoutingLog

SETTINGS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "ram_budget": "100%", "bundle": "off"}


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    """All its experts have slots; nothing but the test changes that."""
    monkeypatch.setattr(pressure, "_PERIOD", 1000.0)
    with contextlib.closing(Llama(**SETTINGS)) as opened:
        yield opened


@pytest.fixture
def listeners(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who began to listen to a routing log, and does."""
    names: list[str] = []
    real = RoutingLog.listen

    def listen(self: RoutingLog, listener: Any, **how: Any) -> None:
        names.append(type(listener).__name__)
        real(self, listener, **how)

    monkeypatch.setattr(RoutingLog, "listen", listen)
    return names


class Broken:
    """Raises while it is broken; then does what it stands for."""

    def __init__(self, real: Any) -> None:
        self._real, self.broken = real, True

    def __call__(self, *args: Any, **settings: Any) -> Any:
        if self.broken:
            raise OSError("out of order")
        return self._real(*args, **settings)


def test_a_policy_that_failed_comes_with_the_next_change(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Broken(engine.AutoPolicy)
    monkeypatch.setattr(engine, "AutoPolicy", begun)
    with pytest.raises(OSError, match="out of order"):
        llama.set_ram_budget("60%")
    assert llama.engine is not None and llama.engine.policy == "auto" and llama.engine.foresight == "off"
    assert llama.expert_stats()["slots"] < llama.expert_stats()["experts"], "the budget is in force nevertheless"
    begun.broken = False
    llama.set_ram_budget("50%")
    assert llama.engine.policy != "auto" and llama.engine.foresight != "off"


def test_what_succeeded_is_not_done_twice(llama: Llama, monkeypatch: pytest.MonkeyPatch, listeners: list[str]) -> None:
    begun = Broken(foresight.look_ahead)
    monkeypatch.setattr(foresight, "look_ahead", begun)
    for budget in ("60%", "50%"):
        with pytest.raises(OSError, match="out of order"):
            llama.set_ram_budget(budget)
    begun.broken = False
    llama.set_ram_budget("40%")
    llama.set_ram_budget("30%")
    assert listeners.count("Keeper") == listeners.count("LookAheadTrial") == 1
    assert llama.engine is not None and llama.engine.foresight != "off"


def test_who_listened_when_it_failed_hears_nothing(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper listens before the rest of the policy is made; a second one must not be told beside it."""
    told = []
    monkeypatch.setattr(Keeper, "token", lambda self, _: told.append(self))
    begun = Broken(auto.Chooser)
    monkeypatch.setattr(auto, "Chooser", begun)
    with pytest.raises(OSError, match="out of order"):
        llama.set_ram_budget("60%")
    begun.broken = False
    llama.set_ram_budget("50%")
    llama.eval([1])
    llama.eval([1])
    assert len(told) == 2


def test_several_at_once_begin_it_once(llama: Llama, monkeypatch: pytest.MonkeyPatch, listeners: list[str]) -> None:
    real = engine.AutoPolicy

    def slow(*args: Any) -> AutoPolicy:
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(engine, "AutoPolicy", slow)
    together = threading.Barrier(4)

    def change() -> None:
        together.wait(timeout=10)
        llama.set_ram_budget("50%")
        assert llama.engine is not None
        seen.append((llama.engine.policy, llama.engine.foresight))

    seen: list[tuple[str, str]] = []
    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert listeners.count("Keeper") == listeners.count("FirstLayer") == 1
    assert len(seen) == 4
    assert all(policy != "auto" and guesses != "off" for policy, guesses in seen), "nobody returns before it is there"
