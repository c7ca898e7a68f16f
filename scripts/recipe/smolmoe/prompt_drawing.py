"""Step 2: draw the beginnings of the rows that the dense model writes itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .config import ChatTokens, PromptConfig
from .corpus_files import TRAINING_STREAM
from .prompts import ASSISTANT, CHAT, FREE, PLAIN_TEXT, USER, Prompts
from .vocabulary import load_tokenizer

DEFAULT_SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class PromptTexts:
    """The lists from which prompts are put together; {t} stands for a topic, {T} for a capitalised one."""

    topics: list[str]
    questions: list[str]
    small_talk: list[str]
    system_messages: list[str]
    openings: list[str]

    @classmethod
    def load(cls) -> PromptTexts:
        """Read the lists that lie beside this module."""
        return cls(**json.loads(resources.files(__package__).joinpath("prompt_texts.json").read_text("utf-8")))


class _PromptWriter:
    """Draws one row's beginning after the other."""

    def __init__(
        self, tokenizer: Tokenizer, real_text: NDArray[np.uint16], config: PromptConfig, rng: np.random.Generator
    ) -> None:
        self._encode = lru_cache(maxsize=None)(lambda text: tokenizer.encode(text).ids)
        self._real_text = real_text
        self._document_starts = np.flatnonzero(real_text == ChatTokens().end_of_text)
        self._texts = PromptTexts.load()
        self._config = config
        self._rng = rng
        shares = (
            config.open_chat_share,
            config.asked_chat_share,
            config.opened_text_share,
            config.continued_text_share,
        )
        self._bounds = np.cumsum(shares)

    def draw(self) -> tuple[list[int], int, int]:
        """Token ids, kind and role of the next row."""
        match int(np.searchsorted(self._bounds, self._rng.random(), side="right")):
            case 0:
                return self._system_turn(), CHAT, USER
            case 1:
                question = self._encode(f"{self._question()}<|im_end|>\n<|im_start|>assistant\n")
                return self._system_turn() + question, CHAT, ASSISTANT
            case 2:
                return self._opening_line(), PLAIN_TEXT, ASSISTANT
            case 3:
                return self._real_piece(), PLAIN_TEXT, ASSISTANT
            case _:
                return [ChatTokens().end_of_text], PLAIN_TEXT, ASSISTANT

    def _pick(self, choices: list[str]) -> str:
        return choices[self._rng.integers(len(choices))]

    def _system_turn(self) -> list[int]:
        if self._rng.random() < self._config.default_system_share:
            message = DEFAULT_SYSTEM_MESSAGE
        else:
            message = self._pick(self._texts.system_messages)
        return self._encode(f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n")

    def _question(self) -> str:
        if self._rng.random() < self._config.small_talk_share:
            return self._pick(self._texts.small_talk)
        return self._pick(self._texts.questions).format(t=self._pick(self._texts.topics))

    def _opening_line(self) -> list[int]:
        topic = self._pick(self._texts.topics)
        line = self._pick(self._texts.openings).format(t=topic, T=topic[0].upper() + topic[1:])
        return [ChatTokens().end_of_text, *self._encode(line)]

    def _real_piece(self) -> list[int]:
        if self._rng.random() < self._config.document_start_share:
            start = self._document_starts[self._rng.integers(len(self._document_starts))]
        else:
            start = self._rng.integers(len(self._real_text) - 200)
        return self._real_text[start : start + self._rng.integers(12, 64)].tolist()


def draw_prompts(
    tokenizer: Tokenizer, real_text: NDArray[np.uint16], rows: int, config: PromptConfig | None = None
) -> Prompts:
    """Draw the beginnings of `rows` rows; the same arguments give the same prompts.

    Args:
        tokenizer: the base model's.
        real_text: the corpus's training stream, shape [n_tokens].
        rows: how many.
        config: shares of the kinds and temperatures.
    """
    config = config or PromptConfig()
    rng = np.random.default_rng(config.seed)
    temperature = rng.uniform(*config.chat_temperature, rows).astype(np.float32)
    prefix = np.full((rows, config.prefix_length), FREE, np.int32)
    kind = np.zeros(rows, np.int8)
    role = np.zeros(rows, np.int8)
    writer = _PromptWriter(tokenizer, real_text, config, rng)
    for row in range(rows):
        ids, kind[row], role[row] = writer.draw()
        if kind[row] == PLAIN_TEXT:
            temperature[row] = rng.uniform(*config.text_temperature)
        ids = ids[: config.prefix_length]
        prefix[row, : len(ids)] = ids
    return Prompts(prefix, kind, role, temperature)


def write_prompts(base: Path, corpus: Path, out: Path, rows: int) -> None:
    """Draw prompts with the base's tokenizer and the corpus in the folder `corpus`, and save them to `out`."""
    prompts = draw_prompts(load_tokenizer(base), np.load(corpus / TRAINING_STREAM), rows)
    prompts.save(out)
    chats = int((prompts.kind == CHAT).sum())
    length = (prompts.prefix != FREE).sum(axis=1).mean()
    print(f"{rows} rows: {chats} chats, {rows - chats} plain texts; mean prefix {length:.1f} tokens")
