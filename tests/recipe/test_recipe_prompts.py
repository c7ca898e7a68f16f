"""The beginnings of the rows that the dense model continues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from smolmoe.config import ChatTokens, PromptConfig
from smolmoe.prompt_drawing import PromptTexts, draw_prompts
from smolmoe.prompts import ASSISTANT, CHAT, FREE, PLAIN_TEXT, USER, Prompts
from smolmoe.vocabulary import load_tokenizer
from tokenizers import Tokenizer

ROWS = 2000


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return load_tokenizer(bundled)


@pytest.fixture(scope="module")
def real_text(tokenizer: Tokenizer) -> np.ndarray:
    document = [ChatTokens().end_of_text, *tokenizer.encode("A short document about nothing. " * 20).ids]
    return np.array(document * 10, np.uint16)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, real_text: np.ndarray) -> Prompts:
    return draw_prompts(tokenizer, real_text, ROWS)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer, prompts: Prompts) -> list[str]:
    rows = [row[row != FREE].tolist() for row in prompts.prefix]
    return tokenizer.decode_batch(rows, skip_special_tokens=False)


def test_shares(prompts: Prompts) -> None:
    config = PromptConfig()
    expected = {
        (CHAT, USER): config.open_chat_share,
        (CHAT, ASSISTANT): config.asked_chat_share,
        (PLAIN_TEXT, ASSISTANT): 1 - config.open_chat_share - config.asked_chat_share,
    }
    for (kind, role), share in expected.items():
        found = ((prompts.kind == kind) & (prompts.role == role)).mean()
        assert found == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / ROWS)), (kind, role)


def test_forms(prompts: Prompts, texts: list[str]) -> None:
    for text, kind, role in zip(texts, prompts.kind, prompts.role, strict=True):
        if kind == CHAT:
            assert text.startswith("<|im_start|>system\n")
            assert text.endswith("<|im_start|>user\n" if role == USER else "<|im_end|>\n<|im_start|>assistant\n")
            assert text.count("<|im_start|>") == 2 + (role == ASSISTANT)
        else:
            assert "<|im_start|>" not in text


def test_free_positions_follow_the_prefix(prompts: Prompts) -> None:
    is_free = prompts.prefix == FREE
    assert (np.diff(is_free.astype(int), axis=1) >= 0).all()
    assert not is_free[:, 0].any()


def test_temperatures(prompts: Prompts) -> None:
    config = PromptConfig()
    for kind, (low, high) in ((CHAT, config.chat_temperature), (PLAIN_TEXT, config.text_temperature)):
        found = prompts.temperature[prompts.kind == kind]
        assert low <= found.min() < found.max() <= high


def test_every_placeholder_is_filled(texts: list[str]) -> None:
    assert not [text for text in texts if "{t}" in text or "{T}" in text]
    lists = PromptTexts.load()
    assert all("{t}" in question for question in lists.questions)
    assert not [text for text in lists.topics + lists.small_talk + lists.system_messages if "{" in text]


def test_same_again_after_saving(tokenizer: Tokenizer, real_text: np.ndarray, prompts: Prompts, tmp_path: Path) -> None:
    draw_prompts(tokenizer, real_text, ROWS).save(tmp_path / "prompts.npz")
    again = Prompts.load(tmp_path / "prompts.npz")
    for name in ("prefix", "kind", "role", "temperature"):
        np.testing.assert_array_equal(getattr(again, name), getattr(prompts, name))
