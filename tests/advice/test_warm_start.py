"""The policy "auto" leaves a profile, and the next start is warm; named policies neither write nor read one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyengine import Llama, bundled_model
from pyengine.advice.profile import Profile, load_profile, profile_file
from pyengine.native import ModelInfo

PROMPT = b"The lighthouse stood on a rock far out in the sea. Every evening its keeper"
SETTINGS: dict[str, Any] = {"n_ctx": 256, "look_ahead": "off", "ram_budget": "50%", "n_threads": 1}


def write(llama: Llama, n_token: int) -> list[int]:
    """Greedy, one token at a time from the first on."""
    llama.reset()
    text = llama.tokenize(PROMPT)[:4]
    for token in text[:-1]:
        llama.eval([token])
    for _ in range(n_token):
        llama.eval([text[-1]])
        text.append(llama.sample(temp=0.0))
    return text


def profile(info: ModelInfo) -> Profile | None:
    return load_profile(profile_file(Path(bundled_model())), info)


def test_the_second_start_is_warm_and_writes_the_same(info: ModelInfo, own_cache: Path) -> None:
    texts, misses, uses = [], [], []
    for start in ("cold", "warm"):
        with contextlib.closing(Llama(**SETTINGS)) as llama:
            before = llama.expert_stats()
            assert before["prefetches"] == (0 if start == "cold" else before["slots"])
            assert before["misses"] == before["evictions"] == 0
            texts.append(write(llama, 12))
            now = llama.expert_stats()
            misses.append(now["misses"] - now["prefetches_late"])
            texts[-1] += write(llama, 30)
            assert now["resident"] <= now["slots"]
        found = profile(info)
        assert found is not None
        assert len(found.recent) == found.n_token == (48 if start == "cold" else 96)
        uses.append(found.uses)
    assert texts[0] == texts[1]
    assert misses[1] < 0.75 * misses[0]
    assert (uses[0] == uses[1]).mean() > 0.9, "the same text twice"
    assert len(list((own_cache / "profiles").iterdir())) == 1


def test_named_policies_neither_write_nor_read(info: ModelInfo, own_cache: Path) -> None:
    with contextlib.closing(Llama(policy="lfu", **SETTINGS)) as llama:
        write(llama, 30)
    assert profile(info) is None and not own_cache.exists()
    with contextlib.closing(Llama(policy="auto", **SETTINGS)) as llama:
        write(llama, 30)
    kept = profile_file(Path(bundled_model())).read_bytes()
    for policy in ("lru", "lfu"):
        with contextlib.closing(Llama(policy=policy, **SETTINGS)) as llama:
            assert llama.expert_stats()["prefetches"] == 0
            write(llama, 30)
    assert profile_file(Path(bundled_model())).read_bytes() == kept


def test_a_short_run_or_one_with_every_expert_in_memory_leaves_none(info: ModelInfo, own_cache: Path) -> None:
    with contextlib.closing(Llama(**SETTINGS)) as llama:
        write(llama, 20)
    with contextlib.closing(Llama(**SETTINGS | {"ram_budget": "100%"})) as llama:
        write(llama, 30)
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "profiles").touch()
    with contextlib.closing(Llama(**SETTINGS)) as llama:
        write(llama, 30)


def test_budgets_that_change_while_experts_are_read_at_start(info: ModelInfo) -> None:
    """At once after loading: what is being read has no slot any more, or there are more slots."""
    with contextlib.closing(Llama(**SETTINGS)) as llama:
        text = write(llama, 30)
    for ram_budget in ("5%", "80%"):
        with contextlib.closing(Llama(**SETTINGS)) as llama:
            llama.set_ram_budget(ram_budget)
            assert write(llama, 30) == text
            stats = llama.expert_stats()
            assert stats["resident"] <= stats["slots"]
            more = stats["prefetches"]
            llama.set_ram_budget("90%")
            assert llama.expert_stats()["prefetches"] > more, "new slots are filled"
            assert write(llama, 8) == text[:12]
    with contextlib.closing(Llama(**SETTINGS)):
        pass  # closed while it reads


FORGETFUL = """
from pyengine import Llama
llama = Llama(n_ctx=128, ram_budget="50%", look_ahead="off")
for _ in range(33):
    llama.eval([5])
"""


@pytest.mark.parametrize("end", ["", "import os; os.fork() or exit()\nos.wait()"])
def test_who_never_closes_still_leaves_a_profile(end: str, info: ModelInfo) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORGETFUL + end],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = profile(info)
    assert found is not None and found.n_token == 33, "once"
