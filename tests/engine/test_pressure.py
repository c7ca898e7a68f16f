"""The pressure watch: expert memory goes back when the machine runs short, and comes again afterwards."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama, pressure
from pyengine.errors import UsageError
from pyengine.pressure import PressureWatch

from .decoding import random_script
from .reference import StockProcess, write

RESERVE = 1000
FLOOR = RESERVE // 2  # what must stay free
WANTED, LEAST = 10_000, 100


PROMPT, N_NEW = random_script([30], N_VOCAB, seed=12)[0], 12
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(autouse=True)
def _reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "reserve", lambda: RESERVE)


class Machine:
    """`total` bytes, of which others use `others`; ours are as many as the budget."""

    def __init__(self, others: int, total: int = 20_000) -> None:
        self.total, self.others, self.ours = total, others, WANTED
        self.applied: list[int] = []
        self.asked = 0
        self.refuses: Exception | None = None
        self.gives: int | None = None  # whatever is asked for
        self.watch = PressureWatch(WANTED, LEAST, self.apply, lambda: self.available)

    @property
    def available(self) -> int:
        return self.total - self.others - self.ours

    def apply(self, budget: int) -> int:
        self.asked += 1
        if self.refuses is not None:
            raise self.refuses
        self.ours = budget if self.gives is None else self.gives
        self.applied.append(self.ours)
        return self.ours

    def look(self, times: int = 1) -> list[int]:
        """The budgets applied by that many looks."""
        before = len(self.applied)
        for _ in range(times):
            self.watch.look()
        return self.applied[before:]


def test_enough_memory_changes_nothing() -> None:
    assert Machine(others=5000).look(50) == []


def test_between_the_floor_and_the_reserve_nothing_changes() -> None:
    machine = Machine(others=20_000 - WANTED - FLOOR)
    assert machine.available == FLOOR
    assert machine.look(50) == []


def test_a_shortage_ends_with_one_look() -> None:
    machine = Machine(others=12_000)
    assert machine.available < 0
    (budget,) = machine.look()
    assert LEAST < budget < WANTED
    assert machine.available >= FLOOR
    assert machine.look(5) == []


def test_no_shortage_takes_more_than_all_but_the_least() -> None:
    machine = Machine(others=30_000)
    assert machine.look() == [LEAST]
    assert machine.look(50) == []


def test_the_budget_comes_back_slowly_and_completely() -> None:
    machine = Machine(others=15_000)
    machine.look()
    low = machine.ours
    machine.others = 0
    assert machine.look(9) == [], "first a calm spell"
    (first,) = machine.look()
    assert first == low + WANTED // 4
    grown = machine.look(1000)
    assert grown == sorted(grown) and grown[-1] == WANTED
    assert len(grown) <= 3, "each change empties a GPU's slots"


def test_a_new_shortage_interrupts_the_calm() -> None:
    machine = Machine(others=15_000)
    machine.look()
    machine.others = 0
    machine.look(9)
    machine.others = 20_000 - machine.ours - FLOOR  # not short, not calm
    machine.look()
    machine.others = 0
    assert machine.look(9) == []
    assert len(machine.look()) == 1


def test_growing_never_brings_the_shortage_back() -> None:
    """With others' use constant it settles: no swinging between giving and taking."""
    for others in range(0, 20_000, 700):
        machine = Machine(others=15_000)
        machine.look()
        machine.others = others
        machine.look(2000)
        settled = machine.ours
        assert machine.look(200) == [], f"still moving with {others} used by others"
        if others <= 20_000 - WANTED - RESERVE - 1:
            assert settled == WANTED


def test_a_little_memory_is_not_worth_a_change() -> None:
    machine = Machine(others=15_000)
    machine.look()
    machine.others = 20_000 - machine.ours - 2 * FLOOR - WANTED // 20 + 1
    assert machine.look(100) == []
    machine.others -= 1
    assert machine.look(100) != []


def test_bounds_hold_whatever_others_do() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(others=5000)
    for _ in range(5000):
        machine.others = int(np.clip(machine.others + rng.normal(0, 2000), 0, 22_000))
        machine.look()
        assert LEAST <= machine.ours <= WANTED
        assert machine.available >= FLOOR or machine.ours == LEAST


def test_the_user_changes_the_budget() -> None:
    machine = Machine(others=15_000)
    machine.look()
    machine.watch.set_wanted(3000)
    assert machine.applied[-1] == machine.ours == 3000
    machine.others = 0
    assert machine.look(100) == [], "3000 is what is wanted now"


def test_each_change_says_why(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(others=15_000)
    machine.look()
    machine.others = 0
    machine.look(10)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "memory is short: " in caplog.text and "memory is free again" in caplog.text


def test_the_thread_looks_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_PERIOD", 0.001)
    looked = threading.Semaphore(0)
    applied: list[int] = []

    def available() -> int:
        looked.release()
        return 0

    def apply(budget: int) -> int:
        applied.append(budget)
        return budget

    watch = PressureWatch(WANTED, LEAST, apply, available)
    before = threading.active_count()
    watch.start()
    for _ in range(20):
        assert looked.acquire(timeout=10)
    watch.stop()
    assert threading.active_count() == before
    assert applied and applied == sorted(applied, reverse=True) and applied[-1] == LEAST


def test_a_watch_that_never_started_stops() -> None:
    PressureWatch(WANTED, LEAST, lambda budget: budget, lambda: 0).stop()


def test_a_budget_that_was_refused_is_not_the_one_in_force() -> None:
    machine = Machine(others=15_000)
    machine.refuses = MemoryError("no")
    with pytest.raises(MemoryError):
        machine.look()
    machine.refuses = None
    assert machine.look() == Machine(others=15_000).look(), "still short, so asked again at once"


def test_the_user_hears_of_a_refusal_and_the_choice_before_holds() -> None:
    machine = Machine(others=15_000)
    machine.look()
    machine.refuses = MemoryError("no")
    with pytest.raises(MemoryError, match="no"):
        machine.watch.set_wanted(12_000)
    machine.refuses = None
    machine.others = 0
    machine.look(1000)
    assert machine.ours == WANTED


def test_what_was_taken_counts_not_what_was_asked() -> None:
    machine = Machine(others=15_000)
    machine.gives = 6000  # no less could be had
    machine.look()
    machine.gives = None
    machine.others = 20_000 - 6000 - FLOOR + 100
    assert machine.look() == [6000 - 100 - FLOOR // 2], "counted from what is in force"


@pytest.mark.parametrize("refusal", ["raises", "gives nothing"])
def test_growth_that_fails_waits_for_calm_again_longer_each_time(refusal: str) -> None:
    machine = Machine(others=15_000)
    machine.look()
    low = machine.ours
    machine.others = 0
    if refusal == "raises":
        machine.refuses = MemoryError("no")
    else:
        machine.gives = low
    asked = []
    for number in range(1, 100):
        before = machine.asked
        with contextlib.suppress(MemoryError):
            machine.look()
        asked += [number] * (machine.asked - before)
    assert asked == [10, 30, 70] and machine.ours == low
    machine.refuses = machine.gives = None
    machine.look(51 + 30)  # the last of the longer spells, then usual ones
    assert machine.ours == WANTED


def test_who_is_told_of_a_change_may_fail_and_the_change_counts() -> None:
    machine = Machine(others=15_000)
    low = 3000

    def fails() -> None:
        raise OSError("no advice")

    machine.watch = PressureWatch(WANTED, LEAST, machine.apply, lambda: machine.available, changed=fails)
    machine.others = 20_000 - low - FLOOR - FLOOR // 2
    with pytest.raises(OSError, match="no advice"):
        machine.look()
    assert machine.applied == [low]
    machine.others += FLOOR // 2 + 100
    with pytest.raises(OSError, match="no advice"):
        machine.look()
    assert machine.applied == [low, low - 100 - FLOOR // 2]


@pytest.mark.parametrize("who", ["available", "floor", "apply"])
def test_the_thread_survives_a_failure_and_says_it_once(
    who: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pressure, "_PERIOD", 0.001)
    called = {"available": 0, "floor": 0, "apply": 0}
    failing = {who}
    applied: list[int] = []
    done = threading.Event()

    def call(name: str) -> None:
        called[name] += 1
        if name in failing:
            if called[name] == 30:
                failing.clear()
            raise OSError("gone") if called[name] <= 15 else UsageError("closed")

    def available() -> int:
        call("available")
        return 0

    def floor() -> int:
        call("floor")
        return FLOOR

    def apply(budget: int) -> int:
        call("apply")
        applied.append(budget)
        if budget == LEAST:
            done.set()
        return budget

    watch = PressureWatch(WANTED, LEAST, apply, available, floor)
    watch.start()
    assert done.wait(timeout=10), "memory was never given back"
    watch.stop()
    assert called[who] > 30 and applied[-1] == LEAST
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2 and "gone" in errors[0] and "closed" in errors[1]
    changes = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(changes) == len(applied), "a change that was refused is none"


def test_a_failure_with_figures_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pressure, "_PERIOD", 0.0001)
    enough = threading.Event()
    looks = iter(range(1, 1_000_000))

    def available() -> int:
        number = next(looks)
        if number == 100:
            enough.set()
        raise MemoryError(f"{number} bytes")

    watch = PressureWatch(WANTED, LEAST, lambda budget: budget, available)
    watch.start()
    assert enough.wait(timeout=10)
    watch.stop()
    assert 2 < len(caplog.records) < 50


def test_a_model_gives_memory_back_and_takes_it_again(
    generated_model: ModelFactory, stock: StockProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from the system's figures to the slots, while the model writes."""
    path = generated_model("qwen2moe").path
    wanted = stock.write(path, PROMPT, N_NEW, **SETTINGS)
    memory = SimpleNamespace(total=1 << 40, available=1 << 39)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(pressure, "_PERIOD", 0.002)
    with contextlib.closing(Llama(path, ram_budget="90%", **SETTINGS)) as llama:
        roomy = llama.expert_stats()["budget_bytes"]

        def write_until(reached: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 30
            while not reached():
                assert time.monotonic() < deadline
                llama.reset()
                assert list(write(llama, PROMPT, N_NEW)) == wanted

        memory.available = 0
        write_until(lambda: llama.expert_stats()["budget_bytes"] == llama.expert_stats()["least_budget"] < roomy)
        assert llama.expert_stats()["resident"] <= llama.expert_stats()["slots"] == 1
        memory.available = 1 << 39
        write_until(lambda: llama.expert_stats()["budget_bytes"] == roomy)


def test_a_model_whose_memory_could_not_be_looked_at_gives_it_back_later(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total=1 << 40, available=1 << 39)
    looks = iter(range(1, 1_000_000))
    failed = threading.Event()

    def look() -> SimpleNamespace:
        if next(looks) % 2:
            failed.set()
            raise OSError("/proc is gone")
        return memory

    with contextlib.closing(Llama(generated_model("qwen2moe").path, ram_budget="90%", **SETTINGS)) as llama:
        assert llama.engine is not None
        roomy = llama.expert_stats()["budget_bytes"]
        monkeypatch.setattr(pressure, "_PERIOD", 0.002)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        llama.set_ram_budget("90%")
        monkeypatch.setattr(psutil, "virtual_memory", look)
        assert failed.wait(timeout=10)
        memory.available = 0
        deadline = time.monotonic() + 30
        while llama.expert_stats()["budget_bytes"] == roomy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
