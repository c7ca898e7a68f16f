"""The chooser beside a running engine: when it asks, what it does with the answer, that its process harms nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest

from pyengine import Llama
from pyengine.advice import choosing
from pyengine.advice.choosing import Chooser
from pyengine.advice.keeper import Keeper
from pyengine.advice.profile import Profile
from pyengine.traces.routing_log import Token

# The judging process gets only the time that nobody else wants.
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="off", n_ctx=64)) as opened:
        yield opened


@pytest.fixture
def keeper(llama: Llama) -> Keeper:
    engine = llama.engine
    assert engine is not None
    return Keeper(engine.native, engine.info, engine.routing_log, "lru")


def make(llama: Llama, keeper: Keeper, profile: Profile | None = None) -> Chooser:
    assert llama.engine is not None
    return Chooser(llama.engine.native, llama.engine.info, keeper, profile)


def tokens(llama: Llama, n: int) -> Iterator[Token]:
    """In every layer a few loyal experts and ever new others, for which LFU is far better than LRU."""
    assert llama.engine is not None
    info, rng = llama.engine.info, np.random.default_rng(2)
    none = np.zeros((info.n_layer, 0), np.float16)
    for _ in range(n):
        ids = np.array([[*rng.permutation(6)[:4], *(6 + rng.permutation(26)[:4])] for _ in range(info.n_layer)])
        yield Token(ids.astype(np.uint16), np.zeros(ids.shape, np.float16), none, 0.01)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE or "pyengine.advice.judging" in child.cmdline():
                found.append(child)
    return found


def test_a_better_policy_takes_over_between_two_tokens(
    llama: Llama, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_QUIET", 0.01)
    chooser = make(llama, keeper)
    stream = tokens(llama, choosing.WINDOW + 1)
    for _ in range(choosing.WINDOW - 1):
        chooser.token(next(stream))
    assert not children() and chooser._judging is None
    chooser.token(next(stream))
    judging = chooser._judging
    assert judging is not None
    until(lambda: judging.ended)
    assert keeper.policy == "lru", "only the computing thread changes it"
    chooser.token(next(stream))
    assert keeper.policy in ("lrfu", "expert-map")
    learned = chooser.learned()
    assert (learned.policy, learned.unjudged) == (keeper.policy, 1)
    assert not children()


def test_what_earlier_runs_left_is_judged_at_once(llama: Llama, keeper: Keeper) -> None:
    recent = np.stack([token.ids for token in tokens(llama, 600)])
    uses = np.full((30, 32), 1 / 32, np.float32)
    early = make(llama, keeper, Profile(uses, recent, 600, "lru", choosing.WINDOW))
    early.begin()
    assert early._judging is None, "a judgement was made some hundred tokens ago"
    chooser = make(llama, keeper, Profile(uses, recent, 600, "", choosing.WINDOW))
    chooser.begin()
    judging = chooser._judging
    assert judging is not None
    assert chooser.learned().unjudged == choosing.WINDOW, "not judged yet"
    until(lambda: judging.ended)
    assert chooser.learned().policy in ("lrfu", "expert-map"), "known, though no token came any more"


def test_a_killed_process_leaves_everything_as_it_was(
    llama: Llama, keeper: Keeper, capfd: pytest.CaptureFixture[str]
) -> None:
    recent = np.stack([token.ids for token in tokens(llama, 600)])
    chooser = make(llama, keeper, Profile(np.ones((30, 32), np.float32), recent, 600, "", 600))
    chooser.begin()
    judging = chooser._judging
    assert judging is not None
    until(lambda: judging._process is not None)
    assert judging._process is not None
    os.kill(judging._process.pid, signal.SIGKILL)
    until(lambda: judging.ended)
    for token in tokens(llama, 2):
        chooser.token(token)
    assert keeper.policy == "lru" and chooser.learned().policy == ""
    assert not children()
    assert capfd.readouterr() == ("", "")


def test_stopping_leaves_no_process(llama: Llama, keeper: Keeper) -> None:
    recent = np.stack([token.ids for token in tokens(llama, 600)])
    chooser = make(llama, keeper, Profile(np.ones((30, 32), np.float32), recent, 600, "", 600))
    chooser.begin()
    chooser.stop()
    judging = chooser._judging
    assert judging is not None
    until(lambda: judging.ended and not children())
    assert judging.answer is None


def test_the_process_has_the_lowest_priority(llama: Llama) -> None:
    process = choosing._start()
    try:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    finally:
        process.kill()
        process.communicate()


def test_no_interpreter_to_run_is_no_error(llama: Llama, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    recent = np.stack([token.ids for token in tokens(llama, 600)])
    chooser = make(llama, keeper, Profile(np.ones((30, 32), np.float32), recent, 600, "", 600))
    chooser.begin()
    judging = chooser._judging
    assert judging is not None
    until(lambda: judging.ended)
    assert judging.answer is None


def test_the_last_tokens_are_kept_in_their_order(llama: Llama, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "WINDOW", 10**6)
    chooser = make(llama, keeper)
    assert chooser.learned().recent.shape == (0, 30, 8)
    seen = [token.ids for token in tokens(llama, 1030)]
    for ids in seen:
        chooser.token(Token(ids, np.zeros(ids.shape, np.float16), np.zeros((30, 0), np.float16), 0.0))
    assert (chooser.recent() == np.stack(seen[-1024:])).all()
    learned = chooser.learned()
    assert learned.n_token == 1030
    assert np.allclose(learned.uses.sum(axis=1), 1) and learned.uses[3, 5] > learned.uses[3, 20] > 0
