"""Below the text: tokens, logits, log probabilities and embeddings against stock llama.cpp, in many configurations."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
import pytest

from .conftest import Ask

PROMPT = "Once upon a time there was a fox who"
PROMPTS = (PROMPT, "def fibonacci(n):\n", "The three laws of thermodynamics are")
#: Of many tokens at once, against stock: mean square of the error by that of the values.
LARGEST_ERROR = 1e-6

Q8_0 = llama_cpp.GGML_TYPE_Q8_0


def error(ours: Any, stock: Any) -> float:
    a, b = np.asarray(ours), np.asarray(stock)
    assert a.shape == b.shape
    return float(((a - b) ** 2).sum() / (b**2).sum())


@pytest.mark.parametrize("budget", ["12.5%", "100%"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_stock(ours: Ask, stock: Ask, prompt: str, budget: str) -> None:
    tokens = ours("greedy", {"ram_budget": budget}, prompt=prompt, n=64)
    assert len(tokens) == 64
    assert tokens == stock("greedy", prompt=prompt, n=64)


def test_eval_and_sample_by_hand_give_what_generate_gives(ours: Ask, stock: Ask) -> None:
    answer = ours("by_hand", prompt=PROMPT, n=12)
    assert answer == stock("by_hand", prompt=PROMPT, n=12)
    assert answer["tokens"] == ours("greedy", prompt=PROMPT, n=12)


@pytest.mark.parametrize("budget", ["6.25%", "100%"])
def test_logits_of_a_prompt(ours: Ask, stock: Ask, budget: str) -> None:
    options = {"logits_all": True}
    answer = ours("logits", options | {"ram_budget": budget}, prompt=PROMPT * 3)
    expected = stock("logits", options, prompt=PROMPT * 3)
    assert answer["likeliest"] == expected["likeliest"]
    assert error(answer["values"], expected["values"]) < LARGEST_ERROR


def test_log_probabilities(ours: Ask, stock: Ask) -> None:
    options = {"logits_all": True}
    question = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0, "logprobs": 4}
    (choice,) = ours("completion", options, **question)["choices"]
    (expected,) = stock("completion", options, **question)["choices"]
    assert choice["text"] == expected["text"]
    found, wanted = choice["logprobs"], expected["logprobs"]
    assert found["tokens"] == wanted["tokens"]
    assert found["text_offset"] == wanted["text_offset"]
    assert found["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-3)
    for top, expected_top in zip(found["top_logprobs"], wanted["top_logprobs"], strict=True):
        assert top == pytest.approx(expected_top, abs=1e-3)


def test_log_probabilities_want_all_logits_as_in_stock(ours: Ask, stock: Ask) -> None:
    question = {"of": "completion", "prompt": PROMPT, "logprobs": 2}
    refusal = ours("refusal", **question)
    assert refusal == stock("refusal", **question)
    assert "logits_all" in refusal[1]


@pytest.mark.parametrize("pooling", [llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN])
def test_embeddings(ours: Ask, stock: Ask, pooling: int) -> None:
    options = {"embedding": True, "pooling_type": pooling}
    texts = ["A cat sat on the mat.", "Stock markets fell.", "A kitten lay on the rug."]
    answer, expected = (ask("embeddings", options, texts=texts) for ask in (ours, stock))
    assert answer["usage"] == expected["usage"]
    for vector, wanted in zip(answer["vectors"], expected["vectors"], strict=True):
        assert error(vector, wanted) < LARGEST_ERROR
    assert error(answer["first"], expected["first"]) < LARGEST_ERROR


def test_embeddings_want_an_embedding_model_as_in_stock(ours: Ask, stock: Ask) -> None:
    question = {"of": "embeddings", "texts": ["x"]}
    refusal = ours("refusal", **question)
    assert refusal == stock("refusal", **question)
    assert "embedding=True" in refusal[1]


@pytest.mark.parametrize(
    "options",
    [
        {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True},
        {"flash_attn": True},
        {"n_batch": 16, "n_ubatch": 4},
        {"n_ctx": 64, "rope_freq_base": 20000.0},
        {"kv_overrides": {"llama.expert_used_count": 4}},
        {"kv_overrides": {"llama.expert_used_count": 12}},
        {"kv_overrides": {"tokenizer.ggml.add_bos_token": True, "llama.rope.freq_base": 50000.0}},
        {"use_mmap": False},
        {"use_mlock": True},
        {"n_gpu_layers": 1},
        {"draft": 4},
        {"offload_kqv": False, "op_offload": False, "swa_full": True},
        {"numa": False, "last_n_tokens_size": 8, "no_perf": True},
    ],
    ids=str,
)
def test_every_option_of_stock_does_the_same(ours: Ask, stock: Ask, options: dict[str, Any]) -> None:
    tokens = ours("greedy", options, prompt=PROMPT, n=16)
    assert tokens == stock("greedy", options, prompt=PROMPT, n=16)


def test_overrides_reach_the_model(ours: Ask) -> None:
    plain = ours("greedy", prompt=PROMPT, n=16)
    assert ours("greedy", {"kv_overrides": {"llama.expert_used_count": 4}}, prompt=PROMPT, n=16) != plain
