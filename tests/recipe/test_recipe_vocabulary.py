"""The recipe's tokenizer against llama.cpp's, on the bundled model's vocabulary (which is the base's)."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from smolmoe.config import ChatTokens
from smolmoe.vocabulary import load_tokenizer
from tokenizers import Tokenizer

TEXTS = [
    "Hello, world!",
    "The year 1984 had 366 days; 3.14159 is pi, 10000000 is not.",
    "  leading blanks,\ttabs\t\tand\n\n\nlines \n",
    "def f(x):\n    return {'a': [x**2, -1], \"b\": None}  # nothing\n",
    "It's they'll we've I'm don't CAN'T",
    "naïve café – Straße, Привет, 你好, 🙂👩‍👩‍👧, \u00a0\u200b\ufeff",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|> <|im_start|>",
    "x" * 300 + "9" * 50 + "." * 70,
    "\x00\x07\x7f control",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return load_tokenizer(bundled)


@pytest.fixture(scope="module")
def stock(bundled: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(bundled), vocab_only=True, verbose=False)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_same_tokens_as_llama_cpp(tokenizer: Tokenizer, stock: llama_cpp.Llama, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == stock.tokenize(text.encode(), add_bos=False, special=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_same_tokens_of_random_text(tokenizer: Tokenizer, stock: llama_cpp.Llama) -> None:
    rng = np.random.default_rng(1)
    alphabet = list("abcdefghijklmnopqrstuvwxyz     \n.,;:!?'\"()-0123456789ABCDEäöüßéñ中あ🙂")
    for _ in range(200):
        text = "".join(rng.choice(alphabet, rng.integers(1, 80)))
        assert tokenizer.encode(text).ids == stock.tokenize(text.encode(), add_bos=False, special=True), text


def test_chat_tokens(stock: llama_cpp.Llama) -> None:
    tokens = ChatTokens()

    def encode(text: str) -> list[int]:
        return stock.tokenize(text.encode(), add_bos=False, special=True)

    assert encode("<|endoftext|><|im_start|><|im_end|>") == [tokens.end_of_text, tokens.im_start, tokens.im_end]
    assert encode("\n<|im_start|>user\n") == list(tokens.open_user)
    assert encode("\n<|im_start|>assistant\n") == list(tokens.open_assistant)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="not a smollm BPE"):
        load_tokenizer(path)
