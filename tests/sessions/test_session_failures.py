"""What fails ends who was part of it, with the reason; the rest goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyengine import Llama
from pyengine.errors import ExpertReadError
from pyengine.sessions import PrefixCache, Scheduler

from .requests import greedy, prompt

Make = Callable[..., Scheduler]


def test_a_disk_that_fails_ends_only_the_sessions_of_that_step(scheduler: Make, tiny: Llama) -> None:
    one = scheduler(max_sequences=2)
    wanted = one.submit(greedy(prompt(30, seed=3), 8))
    list(one.run())
    sessions = [one.submit(greedy(prompt(30, seed=i), 8)) for i in (1, 2, 3)]
    assert tiny.engine is not None
    tiny.engine.native.inject_read_errors(0, 1)
    ended = list(one.run())
    assert set(ended) == set(sessions)
    assert [s.finish_reason for s in sessions] == ["error", "error", "length"]
    for session in sessions[:2]:
        assert isinstance(session.error, ExpertReadError)
        with pytest.raises(ExpertReadError):
            list(session.pieces())
    assert sessions[2].tokens == wanted.tokens
    assert one._cells.used == 0


def test_a_kept_prefix_outlives_a_failed_session(scheduler: Make, tiny: Llama) -> None:
    one = scheduler(prefixes=PrefixCache())
    beginning = prompt(60)
    one.submit(greedy(beginning, 0))
    list(one.run())
    request = greedy(beginning + prompt(20, seed=1), 8)
    (wanted,) = [one.submit(request)]
    list(one.run())
    assert tiny.engine is not None
    tiny.engine.native.inject_read_errors(0, 1)
    failed = one.submit(greedy(beginning + prompt(90, seed=2), 8))
    list(one.run())
    assert failed.finish_reason == "error" and failed.cached_tokens == 60
    again = one.submit(request)
    list(one.run())
    assert again.cached_tokens >= 60 and again.tokens == wanted.tokens


def test_ctrl_c_in_a_computation_takes_nothing_from_anybody(
    scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scheduler()
    requests = [greedy(prompt(20, seed=i), 10) for i in range(3)]
    undisturbed = [one.submit(request) for request in requests]
    list(one.run())
    sessions = [one.submit(request) for request in requests]
    decode, calls = tiny._ctx.decode, 0

    def interrupted(batch: Any) -> None:
        nonlocal calls
        calls += 1
        decode(batch)
        if calls in (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(tiny._ctx, "decode", interrupted)
    interrupts = 0
    while not one.idle:
        try:
            one.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 2
    assert [s.tokens for s in sessions] == [s.tokens for s in undisturbed]
    assert one._cells.used == 0


def test_a_model_that_was_closed_is_said_so(generated_model: Any) -> None:
    from pyengine.errors import UsageError

    llama = Llama(generated_model("qwen2moe").path, ram_budget="60%", n_ctx=256, n_sequences=2)
    one = Scheduler(llama)
    session = one.submit(greedy(prompt(5)))
    one.step()
    llama.close()
    with pytest.raises(UsageError, match="closed"):
        one.step()
    one.close()
    assert session.finish_reason == "cancelled"
