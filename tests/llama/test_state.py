"""What a Llama keeps and gives back: saved states, caches, pickles, and its own end."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_cache import LlamaRAMCache

from pyengine import Llama
from pyengine.errors import UsageError

from .conftest import Ask
from .probes import PROBES

PROMPT = "The old lighthouse keeper"
Opened = Callable[..., Llama]


def native_threads() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())


def test_a_saved_state_continues_as_it_did(ours: Ask, stock: Ask) -> None:
    answer = ours("state_round_trip", prompt=PROMPT, n=10)
    first, again = answer["answers"]
    assert first == again
    assert answer == stock("state_round_trip", prompt=PROMPT, n=10)


def test_a_state_saved_at_one_budget_continues_at_another(opened: Opened) -> None:
    small, whole = opened(ram_budget="12.5%"), opened(ram_budget="100%")
    expected = PROBES["greedy"](small, PROMPT, 10)
    small.reset()
    small.eval(small.tokenize(PROMPT.encode()))
    whole.load_state(small.save_state())
    tokens = []
    for token in whole.generate(whole.eval_tokens, temp=0.0):
        tokens.append(token)
        if len(tokens) == len(expected):
            break
    assert tokens == expected


def test_a_cache_is_used_and_changes_nothing(opened: Opened) -> None:
    llm = opened(ram_budget="25%")
    plain = PROBES["completion"](llm, prompt=PROMPT, max_tokens=6, temperature=0.0)
    llm.set_cache(LlamaRAMCache())
    for _ in range(2):
        assert PROBES["completion"](llm, prompt=PROMPT, max_tokens=6, temperature=0.0) == plain
    assert llm.cache is not None
    assert llm.cache.cache_size > 0


def test_reset_forgets(opened: Opened) -> None:
    llm = opened(ram_budget="25%")
    expected = PROBES["greedy"](llm, PROMPT, 4)
    llm.eval(llm.tokenize(b" and something else altogether"))
    llm.reset()
    assert llm.n_tokens == 0
    assert PROBES["greedy"](llm, PROMPT, 4) == expected


def test_a_pickle_opens_the_same_model_with_the_same_budget(opened: Opened) -> None:
    llm = opened(ram_budget="50%", n_ctx=256, logits_all=True)
    llm.set_ram_budget("25%")
    assert llm.__getstate__()["ram_budget"] == "25%"
    with contextlib.closing(pickle.loads(pickle.dumps(llm))) as copy:
        assert type(copy) is Llama
        assert copy.n_ctx() == llm.n_ctx()
        assert copy.expert_stats()["slots"] == llm.expert_stats()["slots"]
        assert (copy.n_threads, copy.n_threads_batch) == (1, 1)
        assert PROBES["greedy"](copy, PROMPT, 6) == PROBES["greedy"](llm, PROMPT, 6)


@pytest.mark.parametrize("budget", ["12.5%", "auto", 20_000_000])
def test_a_pickle_keeps_the_words_of_the_budget(opened: Opened, budget: str | int) -> None:
    assert opened(ram_budget=budget).__getstate__()["ram_budget"] == budget


def test_close_frees_and_may_be_repeated() -> None:
    before = native_threads()
    llm = Llama(n_ctx=64, n_threads=1, n_threads_batch=1, ram_budget="25%")
    llm.create_completion("x", max_tokens=2)
    assert native_threads() - before
    llm.close()
    llm.close()
    assert not native_threads() - before


def test_what_is_not_closed_is_freed_with_its_last_reference() -> None:
    before = native_threads()
    llm = Llama(n_ctx=64, n_threads=1, n_threads_batch=1, ram_budget="25%")
    llm.create_completion("x", max_tokens=2)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert not native_threads() - before


USES: dict[str, Callable[[Llama], Any]] = {
    "complete": lambda llm: llm("x"),
    "stream": lambda llm: list(llm.create_completion("x", stream=True)),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "x"}]),
    "embed": lambda llm: llm.create_embedding("x"),
    "tokenize": lambda llm: llm.tokenize(b"x"),
    "detokenize": lambda llm: llm.detokenize([5]),
    "eval": lambda llm: llm.eval([5]),
    "sample": lambda llm: llm.sample(),
    "generate": lambda llm: next(llm.generate([5])),
    "save_state": lambda llm: llm.save_state(),
    "n_ctx": lambda llm: llm.n_ctx(),
    "ctx": lambda llm: llm.ctx,
    "expert_stats": lambda llm: llm.expert_stats(),
    "engaged": lambda llm: llm.engaged,
    "set_ram_budget": lambda llm: llm.set_ram_budget("50%"),
}


@pytest.fixture(scope="module")
def closed() -> Llama:
    llm = Llama(n_ctx=64, n_threads=1, n_threads_batch=1, ram_budget="25%", embedding=True)
    llm.create_embedding("x")
    llm.eval([5])
    llm.close()
    return llm


@pytest.mark.parametrize("use", USES)
def test_use_after_close_is_an_error_and_no_crash(closed: Llama, use: str) -> None:
    with pytest.raises(UsageError, match="closed"):
        USES[use](closed)


def test_a_stream_that_outlives_its_model_ends_with_an_error() -> None:
    llm = Llama(n_ctx=64, n_threads=1, n_threads_batch=1, ram_budget="25%")
    stream: Iterator[Any] = llm.create_completion("x", stream=True, max_tokens=20)  # type: ignore[assignment]
    next(stream)
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        list(stream)


def test_close_waits_for_the_thread_that_computes() -> None:
    llm = Llama(n_ctx=512, n_threads=1, n_threads_batch=1, ram_budget="12.5%")
    started, ends = threading.Event(), []

    def compute() -> None:
        started.set()
        try:
            llm.create_completion("word " * 300, max_tokens=400, temperature=0.0)
            ends.append("finished")
        except UsageError:
            ends.append("closed")

    thread = threading.Thread(target=compute)
    thread.start()
    started.wait()
    while not llm.expert_stats()["expert_ffns"]:  # until it is inside a computation
        time.sleep(0.001)
    llm.close()
    thread.join()
    assert ends == ["closed"]
