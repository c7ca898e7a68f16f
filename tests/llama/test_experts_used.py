"""llama.cpp is told that routers choose another number of experts than the file says (kv_overrides)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import Llama, bundled_model
from pyengine.advice.profile import LEAST_TOKENS, profile_file
from pyengine.errors import BudgetError, PyengineError

from .conftest import Ask

PROMPT = "Once upon a time there was a fox who"
KEY = "llama.expert_used_count"
ON_GPU: dict[str, Any] = {"gpu": "CPU", "hybrid": False, "ram_budget": "100%"}
#: Slots of the bundled model's experts on a GPU: 11 of 64 KiB, which 8 experts of a token fit into and 12 do not.
TOO_FEW = 11 * 65536

Opened = Callable[..., Llama]


@pytest.mark.parametrize("used", [1, 4, 12])
def test_tokens_are_those_of_stock(ours: Ask, stock: Ask, used: int) -> None:
    overrides = {"kv_overrides": {KEY: used}}
    tokens = ours("greedy", overrides | {"ram_budget": "12.5%"}, prompt=PROMPT, n=24)
    assert tokens == stock("greedy", overrides, prompt=PROMPT, n=24)


def test_the_least_in_vram_is_what_a_token_needs(opened: Opened) -> None:
    with pytest.raises(BudgetError, match=f"{12 * 65536:,}"):
        opened(kv_overrides={KEY: 12}, **ON_GPU, vram_budget=TOO_FEW)
    llm = opened(kv_overrides={KEY: 12}, **ON_GPU, vram_budget=12 * 65536)
    llm.eval(llm.tokenize(PROMPT.encode()))
    assert llm.expert_stats()["slots"] == 12


def _unknown_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyengine.engine.apply_overrides", lambda native, overrides: None)


def test_more_experts_than_slots_is_an_error_and_no_wrong_token(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unknown_to_the_engine(monkeypatch)
    llm = opened(kv_overrides={KEY: 12}, **ON_GPU, vram_budget=TOO_FEW)
    with pytest.raises(PyengineError, match="more expert slots than there are"):
        llm.eval([5])
    with pytest.raises(PyengineError, match="more expert slots than there are"):
        llm.eval([6])


def test_another_number_than_expected_is_said_and_nothing_is_learned(
    ours: Ask,
    stock: Ask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _unknown_to_the_engine(monkeypatch)
    overrides = {"kv_overrides": {KEY: 4}}
    tokens = ours("greedy", overrides | {"ram_budget": "20%"}, prompt=PROMPT, n=24)
    assert tokens == stock("greedy", overrides, prompt=PROMPT, n=24)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "choose 4 experts for each token where 8 were expected" in said


def test_what_is_recorded_is_what_was_chosen(opened: Opened) -> None:
    llm = opened(kv_overrides={KEY: 4}, ram_budget="25%", policy="lru", look_ahead="off")
    assert llm.engine is not None
    native, info = llm.engine.native, llm.engine.info
    native.set_recording(ids=True, inputs=False)
    for token in (5, 6, 7):
        llm.eval([token])
    llm.reset()
    ids, _, _ = native.take_recording(8, info, inputs=False)
    assert ids.shape == (3, 30, 4)
    assert all(len(set(chosen)) == 4 for chosen in ids.reshape(-1, 4).tolist())
    assert int(ids.max()) < info.n_expert and len(np.unique(ids)) > 4


def test_it_learns_apart(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for overrides in ({}, {KEY: 4}, {KEY: 8}):  # the last is what the file says
        llm = opened(kv_overrides=overrides, ram_budget="25%")
        for token in range(5, 5 + LEAST_TOKENS + 1):
            llm.eval([token])
        llm.close()
    kept = {profile_file(bundled_model()), profile_file(bundled_model(), 4)}
    assert {path for path in kept if path.exists()} == kept
    assert len(list(next(iter(kept)).parent.iterdir())) == 2
