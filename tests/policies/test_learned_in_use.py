"""A run with a learned policy: the same tokens, other misses; without a file a sentence instead of a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import Llama, bundled_model
from pyengine.errors import UsageError
from pyengine.policies import CacheShape
from pyengine.policies.kept import policy_file, save_policy
from pyengine.policies.learned import LearnedPolicy, blank
from pyengine.traces import TracedModel

PROMPT = b"The lighthouse stood on a rock far out in the sea. Every evening its keeper"
SETTINGS: dict[str, Any] = {"n_ctx": 256, "look_ahead": "off", "n_threads": 1}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy of the bundled model that has senseless opinions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy = LearnedPolicy(CacheShape(30, 32, 8, 480))
    parameters, random = blank(960), np.random.default_rng(0)
    parameters["bias"] += random.standard_normal(parameters["bias"].shape, np.float32) * 5
    policy.take(parameters)
    path = policy_file(Path(bundled_model()))
    save_policy(path, TracedModel("", "", 30, 32, 8), policy.save())
    return path


def written(policy: str, budget: str) -> tuple[list[int], dict[str, Any], str]:
    """Tokens, what experts did, the policy that was in use."""
    with contextlib.closing(Llama(policy=policy, ram_budget=budget, **SETTINGS)) as llama:
        text = llama.tokenize(PROMPT)
        tokens = [token for token, _ in zip(llama.generate(text, temp=0.0), range(24), strict=False)]
        assert llama.engine is not None
        return tokens, llama.expert_stats(), llama.engine.policy


@pytest.mark.parametrize("budget", ["15%", "60%"])
def test_the_same_tokens(kept: Path, budget: str) -> None:
    tokens, stats, policy = written("learned", budget)
    wanted, plain, _ = written("lru", budget)
    assert tokens == wanted and len(tokens) == 24
    assert policy == "learned" and stats["evictions"] > 0
    assert stats["misses"] != plain["misses"], "its opinions were heard"


def test_nothing_learned_is_said_in_a_sentence(kept: Path) -> None:
    kept.write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"no cache policy was learned for .*; `pyengine learn-policy TRACE -m "):
        Llama(policy="learned", ram_budget="50%", **SETTINGS)


def test_auto_knows_of_it(kept: Path) -> None:
    with contextlib.closing(Llama(ram_budget="50%", **SETTINGS)) as llama:
        assert llama.engine is not None and llama.engine._auto is not None
        assert llama.engine._auto._keeper.learned == kept
