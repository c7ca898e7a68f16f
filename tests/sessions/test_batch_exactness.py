"""A batch of sequences gives the same at every budget, bit by bit, and as stock llama.cpp for the same batches: bit by
bit where no step is long enough for the engine to compute expert by expert, else up to rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.sessions import PrefixCache, Scheduler

from .conftest import SETTINGS
from .requests import greedy, prompt
from .tape import Logits, Tape, assert_same_bits, nmse

BUDGETS = ("12.5%", "50%", "100%")


def computed(
    llama: Llama, patch: pytest.MonkeyPatch, run: Callable[[Scheduler], None]
) -> tuple[Tape, list[list[int]], Logits]:
    """What a fresh scheduler does, the tokens of its sessions, and all logits [outputs, n_vocab]."""
    sessions = []
    with patch.context() as inner, Scheduler(llama, prompt_chunk=24, prefixes=PrefixCache()) as one:
        tape, submit = Tape(llama, inner), one.submit
        inner.setattr(one, "submit", lambda request: sessions.append(submit(request)))
        run(one)
        for _ in one.run():
            pass
    return tape, [session.tokens for session in sessions], np.array(tape.logits)


def busy(one: Scheduler) -> None:
    """Chats that begin while others decode, a long prompt among them, and a beginning that two share."""
    shared = prompt(40, seed=30)
    one.submit(greedy(shared + prompt(6, seed=1), 12))
    one.submit(greedy(prompt(30, seed=2), 9))
    for _ in range(3):
        one.step()
    one.submit(greedy(prompt(120, seed=3), 6))
    one.submit(greedy(shared + prompt(11, seed=4), 8))
    one.step()
    one.submit(greedy(prompt(5, seed=5), 7))


@pytest.mark.parametrize("model_id", ["qwen2moe", "gpt-oss", "deepseek2", "nemotron_h_moe"])
def test_a_batch_of_sequences_is_the_same_at_every_budget_and_as_in_stock(
    model_id: str, generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = []
    for budget in BUDGETS:
        llama = Llama(generated_model(model_id).path, ram_budget=budget, n_sequences=8, **SETTINGS)
        with contextlib.closing(llama):
            tape, tokens, logits = computed(llama, monkeypatch, busy)
            results.append((tape.steps, tokens, logits))
    assert max(len({entry[2] for entry in batch}) for batch in tape.batches) >= 4, "sequences in one batch"
    wanted = np.array(tape.replayed_by_stock(tmp_path, n_sequences=8, **SETTINGS))
    for steps, their_tokens, their_logits in results:
        assert their_tokens == tokens and all(tokens)
        assert steps == tape.steps
        assert_same_bits(their_logits, logits)
    assert nmse(logits, wanted) < 1e-6


def test_short_steps_of_several_sequences_have_stocks_bits(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def short(one: Scheduler) -> None:
        for number in range(5):
            one.submit(greedy(prompt(3 + number, seed=number), 10))
            one.step()

    tape, tokens, logits = computed(tiny, monkeypatch, short)
    assert len(tokens) == 5 and 5 < max(map(len, tape.batches)) <= 16
    assert_same_bits(logits, np.array(tape.replayed_by_stock(tmp_path, n_sequences=8, **SETTINGS)))


def test_four_chats_of_the_bundled_model_are_the_same_at_every_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"n_ctx": 512, "n_threads": 2, "n_threads_batch": 2}
    texts = ("What is the capital of France?", "Why is the sky blue?", "Count to ten.", "Tell me a story.")
    results = []

    def chats(one: Scheduler) -> None:
        for text in texts:
            turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            one.submit(greedy(llama.tokenize(turn.encode(), special=True), 6))

    for budget in BUDGETS:
        with contextlib.closing(Llama(ram_budget=budget, n_sequences=4, **sizes)) as llama:
            tape, tokens, logits = computed(llama, monkeypatch, chats)
            results.append((tokens, logits))
    wanted = np.array(tape.replayed_by_stock(tmp_path, n_sequences=4, **sizes))
    for their_tokens, their_logits in results:
        assert their_tokens == tokens and len(tokens) == 4
        assert_same_bits(their_logits, logits)
    assert nmse(logits, wanted) < 1e-6
